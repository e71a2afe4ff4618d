package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/devices/tap"
	"github.com/gondola-vmm/gondola/devices/usernet"
	"github.com/gondola-vmm/gondola/devices/virtio/vsock"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

// parseNetwork reads user[,OPTION…], tap:NAME[,OPTION…], private:NAME[,OPTION…] or
// none. The directory of a private network is the caller's to find (settle).
func parseNetwork(s string) (*guest.Network, error) {
	words := strings.Split(s, ",")
	n := &guest.Network{}
	tapName, isTap := strings.CutPrefix(words[0], "tap:")
	private, isPrivate := strings.CutPrefix(words[0], "private:")
	configured := isTap || isPrivate // by options
	switch {
	case s == "none":
		return nil, nil
	case isTap && tapName != "" && len(tapName) < 16:
		n.Tap = tapName
	case isPrivate:
		if err := control.CheckName(private); err != nil {
			return nil, err
		}
		n.Private = private
	case words[0] == "user":
	default:
		return nil, fmt.Errorf("%q: choose user, tap:NAME, private:NAME or none", s)
	}
	for _, w := range words[1:] {
		name, value, _ := strings.Cut(w, "=")
		var err error
		switch {
		case name == "host" && value == "" && !configured:
			n.HostAccess = true
		case name == "mac":
			var hw net.HardwareAddr
			if hw, err = net.ParseMAC(value); err == nil && (len(hw) != 6 || hw[0]&1 != 0) {
				err = errors.New("no station's address")
			}
			if err == nil {
				n.MAC = [6]byte(hw)
			}
		case name == "mtu":
			var v uint64
			if v, err = strconv.ParseUint(value, 10, 16); err == nil && v < 576 {
				err = errors.New("want 576 to 65535")
			}
			n.MTU = uint16(v)
		case name == "link":
			if n.Down = value == "down"; value != "down" && value != "up" {
				err = errors.New("want up or down")
			}
		case name == "queues" && isTap:
			if n.Queues, err = strconv.Atoi(value); err != nil || n.Queues < 1 || n.Queues > tap.MaxQueues {
				err = fmt.Errorf("want 1 to %d", tap.MaxQueues)
			}
		case name == "ip" && configured:
			n.Address, err = netip.ParsePrefix(value)
		case name == "gw" && configured:
			n.Gateway, err = netip.ParseAddr(value)
		case name == "dns" && configured:
			n.DNS, err = netip.ParseAddr(value)
		default:
			var known bool
			if known, err = limitOption(&n.Limits, name, value); !known {
				err = errors.New("the options are mac=ADDRESS, mtu=N, link=up or down, " + limitOptions + "; with user host, with tap and private ip=ADDRESS/BITS, gw=ADDRESS, dns=ADDRESS, with tap queues=N")
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %w", words[0], w, err)
		}
	}
	return n, nil
}

// settle finds the directory of a machine's private network, and gives the machine a
// station's address of its own, which is the same each time, on networks that it shares
// with others: private ones, and those behind a TAP interface if it is a copy of another
// machine, of the state from (nil: none). A machine that goes on from its own state
// keeps the one that it had.
func settle(n *guest.Network, machine string, from *origin) {
	if n == nil {
		return
	}
	if n.Private != "" {
		n.Private = filepath.Join(control.DefaultHome(), ".nets", n.Private)
	}
	own := from == nil && n.Private != "" || from != nil && from.machine != machine && (n.Private != "" || n.Tap != "")
	if own && n.MAC == [6]byte{} {
		sum := sha256.Sum256([]byte(machine))
		n.MAC = [6]byte{0x52, 0x54, 0, sum[0], sum[1], sum[2]}
	}
}

// forClones are the values of --net for count machines from a state, of which the
// first has the given address, and the others those that follow it.
func forClones(net string, shape guest.Shape, count int) ([]string, error) {
	list := make([]string, count)
	if net == "" {
		return list, nil
	}
	n, err := parseNetwork(net)
	if err != nil {
		return nil, usageError{fmt.Errorf("--net %w", err)}
	}
	if n != nil && count > 1 {
		switch {
		case n.Tap != "":
			return nil, usageError{errors.New("--net: a TAP interface is one machine's: clone one at a time, each with its own")}
		case n.MAC != [6]byte{}:
			return nil, usageError{errors.New("--net: mac= would be the address of all; without it each has one of its own")}
		case !n.Address.IsValid() && shape.Address() != "":
			return nil, usageError{fmt.Errorf("--net: the state's guest has the address %s, and all of the machines would: give the first one's, as in %s,ip=%s; the others get those that follow", shape.Address(), net, shape.Address())}
		}
	}
	words := strings.Split(net, ",")
	for i := range list {
		if n != nil && n.Address.IsValid() {
			for k, w := range words {
				if strings.HasPrefix(w, "ip=") {
					words[k] = "ip=" + n.Address.String()
				}
			}
			next := n.Address.Addr().Next()
			if i < count-1 && !n.Address.Masked().Contains(next) {
				return nil, usageError{fmt.Errorf("--net: %s, from the given address on, has no addresses for %d machines", n.Address.Masked(), count)}
			}
			n.Address = netip.PrefixFrom(next, n.Address.Bits())
		}
		list[i] = strings.Join(words, ",")
	}
	return list, nil
}

// parseForward reads [ADDRESS:]HOST:GUEST[/udp|/tcp].
func parseForward(s string) (usernet.Forward, error) {
	bad := fmt.Errorf("%q: want [ADDRESS:]HOSTPORT:GUESTPORT[/udp], for example 8080:80 or 53:53/udp", s)
	s, proto, given := strings.Cut(s, "/")
	if given && proto != "udp" && proto != "tcp" {
		return usernet.Forward{}, bad
	}
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return usernet.Forward{}, bad
	}
	host, port := s[:i], s[i+1:]
	if !strings.Contains(host, ":") {
		host = "127.0.0.1:" + host
	}
	at, err := netip.ParseAddrPort(host)
	to, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil || to == 0 || !at.Addr().Is4() {
		return usernet.Forward{}, bad
	}
	return usernet.Forward{Host: at, Guest: uint16(to), UDP: proto == "udp"}, nil
}

func linkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "link NAME up|down",
		Short: "Plug the cable of a machine's network in or out",
		Long: `Plug the cable of a running machine's network in or out: the guest sees the
carrier of eth0 come and go. Frames are lost while it is out.`,
		Example: "  gondola link dev down",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 || args[1] != "up" && args[1] != "down" {
				return usageError{errors.New("gondola link takes the machine's name, and up or down")}
			}
			return nil
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return []string{"up", "down"}, cobra.ShellCompDirectiveNoFileComp
			}
			return completeMachine(cmd, args, word)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := dial(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer c.Close()
			if err := c.SetLink(cmd.Context(), args[1] == "up"); err != nil {
				return fmt.Errorf("machine %s: %w", args[0], err)
			}
			return nil
		},
	}
}

// parseVsock reads CID[,path=PATH].
func parseVsock(s string) (*guest.Vsock, error) {
	cid, rest, _ := strings.Cut(s, ",")
	n, err := strconv.ParseUint(cid, 10, 32)
	if err != nil || n < vsock.MinCID || n > vsock.MaxCID {
		return nil, fmt.Errorf("%q: want a CID of %d to %d", cid, vsock.MinCID, uint64(vsock.MaxCID))
	}
	v := &guest.Vsock{CID: uint32(n)}
	if rest != "" {
		path, ok := strings.CutPrefix(rest, "path=")
		if !ok || path == "" {
			return nil, fmt.Errorf("%q: the one option is path=PATH", rest)
		}
		if v.Path, err = filepath.Abs(path); err != nil {
			return nil, err
		}
	}
	return v, nil
}
