package initconf

import (
	"fmt"
	"net/netip"
	"strings"
)

// Net is the configuration of a network interface:
// gondola.net=NAME,ADDRESS/BITS[,[GATEWAY][,DNS]], IPv4.
type Net struct {
	Name    string
	Address netip.Prefix
	Gateway netip.Addr // zero: none
	DNS     netip.Addr // zero: none
}

// ParseNet reads the value of gondola.net.
func ParseNet(s string) (n Net, err error) {
	w := strings.Split(s, ",")
	if len(w) < 2 || len(w) > 4 || w[0] == "" || len(w[0]) > 15 {
		return Net{}, fmt.Errorf("gondola.net=%s: want NAME,ADDRESS/BITS,GATEWAY,DNS", s)
	}
	n.Name = w[0]
	if n.Address, err = netip.ParsePrefix(w[1]); err == nil && !n.Address.Addr().Is4() {
		err = fmt.Errorf("%s is no IPv4 address", w[1])
	}
	for i, to := range []*netip.Addr{&n.Gateway, &n.DNS} {
		if err != nil || len(w) <= i+2 || w[i+2] == "" {
			continue
		}
		if *to, err = netip.ParseAddr(w[i+2]); err == nil && !to.Is4() {
			err = fmt.Errorf("%s is no IPv4 address", w[i+2])
		}
	}
	if err != nil {
		return Net{}, fmt.Errorf("gondola.net=%s: %w", s, err)
	}
	return n, nil
}
