package main

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/devices/disk"
	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/devices/virtio/blk"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

// parseDisk reads PATH[,OPTION…].
func parseDisk(s string) (guest.Disk, error) {
	words := strings.Split(s, ",")
	d := guest.Disk{Path: words[0]}
	if d.Path == "" {
		return d, fmt.Errorf("%q: the path is missing", s)
	}
	for _, w := range words[1:] {
		name, value, _ := strings.Cut(w, "=")
		var err error
		switch name {
		case "ro", "cow", "backing":
			if value != "" {
				err = errors.New("it takes no value")
			}
			d.Backing = d.Backing || name == "backing"
			d.ReadOnly, d.COW = d.ReadOnly || name == "ro", d.COW || name == "cow"
		case "serial":
			if d.Serial = value; value == "" || len(value) > blk.MaxSerial {
				err = fmt.Errorf("want 1 to %d characters", blk.MaxSerial)
			}
		case "queues":
			if d.Queues, err = strconv.Atoi(value); err != nil || d.Queues < 1 || d.Queues > blk.MaxQueues {
				err = fmt.Errorf("want 1 to %d", blk.MaxQueues)
			}
		case "block":
			n, perr := strconv.ParseUint(value, 10, 32)
			if d.BlockSize = uint32(n); perr != nil || n < 512 || n > 4096 || n&(n-1) != 0 {
				err = errors.New("want 512, 1024, 2048 or 4096")
			}
		default:
			var known bool
			if known, err = limitOption(&d.Limits, name, value); !known {
				err = errors.New("the options are ro, cow, backing, serial=TEXT, queues=N, block=BYTES, " + limitOptions)
			}
		}
		if err != nil {
			return d, fmt.Errorf("%s: %s: %w", d.Path, w, err)
		}
	}
	if d.ReadOnly && d.COW {
		return d, fmt.Errorf("%s: ro and cow exclude each other: with cow, the guest writes, and the file stays as it is", d.Path)
	}
	return d, nil
}

const limitOptions = "bps=SIZE, iops=N, bps-burst=SIZE, iops-burst=N"

// limitOption sets one of the limits by its name; known is false if there is none
// of that name.
func limitOption(l *ratelimit.Limits, name, value string) (known bool, err error) {
	var to *uint64
	switch name {
	case "bps":
		to = &l.BytesPerSecond
	case "bps-burst":
		to = &l.BytesBurst
	case "iops":
		to = &l.OpsPerSecond
	case "iops-burst":
		to = &l.OpsBurst
	default:
		return false, nil
	}
	var n memorySize
	if value == "none" {
		value = "0"
	}
	if err := n.Set(value); err != nil {
		return true, err
	}
	*to = uint64(n)
	return true, nil
}

func diskCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "disk",
		Short: "Make, describe, check, attach and detach disks",
		Long: `A disk is a raw image file, a block device, or a layer: a file whose name ends in
.layer, which has what was written since it was made, over a base that is not
written any more (docs/disk-layers.md). A file whose name ends in .qcow2 is an
image in QEMU's format; it is only read, so it takes ro, cow or a layer over it.
Files are locked while they are used.

gondola run --disk PATH[,OPTION…] attaches a disk; the options are
  ro              read-only; several machines can use the file so
  cow             what the guest writes goes to a temporary layer, and to those of
                  the machine's states; PATH stays as it is; several machines can
                  use the file so
  backing         a qcow2 image may have the guest read the files of the host that
                  it names as its backing files
  serial=TEXT     serial number, at most 20 characters
  queues=N        request queues, 1 to 16
  block=BYTES     logical block size, 512 to 4096
  bps=SIZE        bytes per second at most, with K, M or G
  iops=N          operations per second at most
  bps-burst=SIZE, iops-burst=N
                  what can be had at once after a pause (default: a tenth of a
                  second's worth)`,
		Example: `  gondola disk create data.img 1G
  gondola disk create --base root.img today.layer
  gondola run --disk today.layer --disk data.img,serial=data,iops=500
  gondola disk attach dev env.img,ro`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(diskCreateCommand(), diskInfoCommand(), diskCheckCommand(), diskAttachCommand(), diskDetachCommand())
	return c
}

func diskCreateCommand() *cobra.Command {
	var base string
	var backing bool
	c := &cobra.Command{
		Use:   "create PATH [SIZE]",
		Short: "Make an empty raw image, or a layer",
		Long: `Make an empty raw image of SIZE bytes (with K, M, G or T), or, with --base, a layer
of SIZE (default: the base's). The base must not be written from then on: a layer
is frozen, a raw image is refused as a base once it was written.`,
		Example: `  gondola disk create data.img 10G
  gondola disk create --base root.img today.layer`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 1 || len(args) > 2 || len(args) == 1 && base == "" {
				return usageError{errors.New("gondola disk create takes PATH and SIZE; SIZE can be left out with --base")}
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			var size memorySize
			if len(args) == 2 {
				if err := size.Set(args[1]); err != nil {
					return usageError{fmt.Errorf("SIZE %q: %w", args[1], err)}
				}
			}
			switch is := disk.IsLayer(args[0]); {
			case base != "" && !is:
				return usageError{fmt.Errorf("the name of a layer ends in %s, unlike %s", disk.Suffix, args[0])}
			case base == "" && is:
				return usageError{fmt.Errorf("%s would be a layer: give its --base", args[0])}
			case base != "":
				return disk.Create(args[0], base, uint64(size), disk.Options{Backing: backing})
			}
			return disk.CreateRaw(args[0], uint64(size))
		},
	}
	c.Flags().StringVar(&base, "base", "", "make a layer over this raw image, block device, qcow2 image or layer")
	backingFlag(c, &backing)
	return c
}

func onePath(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usageError{fmt.Errorf("gondola disk %s takes the path of one disk", cmd.Name())}
	}
	return nil
}

func backingFlag(c *cobra.Command, to *bool) {
	c.Flags().BoolVar(to, "backing", false, "a qcow2 image may name the files that it is based on")
}

func diskInfoCommand() *cobra.Command {
	var asJSON, backing bool
	c := &cobra.Command{
		Use:   "info PATH",
		Short: "Describe a disk's files, from the top to the base",
		Args:  onePath,
		RunE: func(cmd *cobra.Command, args []string) error {
			files, err := stack(args[0], backing)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), files)
			}
			tw := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			fmt.Fprintln(tw, "FORMAT\tSIZE\tON DISK\tSTATE\tPATH")
			for i, f := range files {
				state := "written"
				switch {
				case f.Frozen:
					state = "frozen"
				case i > 0:
					state = "base"
				case f.Format == "qcow2":
					state = "only read"
				}
				fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", f.Format, size(f.Size), size(f.Allocated), state, f.Path)
			}
			return tw.Flush()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	backingFlag(c, &backing)
	return c
}

func stack(path string, backing bool) ([]disk.File, error) {
	d, err := disk.Open(path, disk.Options{ReadOnly: true, Backing: backing})
	if err != nil {
		return nil, err
	}
	files, err := d.Files()
	return files, errors.Join(err, d.Close())
}

func diskCheckCommand() *cobra.Command {
	var backing bool
	c := &cobra.Command{
		Use:   "check PATH",
		Short: "Check a disk's layers and bases",
		Long: `Check the header, the map and the base of every layer of a disk. The content of
blocks has no checksums and is not checked: the guest's file system does that.`,
		Args: onePath,
		RunE: func(cmd *cobra.Command, args []string) error {
			files, err := stack(args[0], backing)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %d files, nothing wrong\n", args[0], len(files))
			return err
		},
	}
	backingFlag(c, &backing)
	return c
}

func diskAttachCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "attach NAME PATH[,OPTION…]",
		Short: "Attach a disk to a running machine",
		Long: `Put a disk into a slot that the machine was started with (--disk-slots) and print
its name in the guest, where an empty disk grows. The options are those of gondola
disk, but for queues and block.

The kernel reads no partition table by itself then (blockdev --rereadpt does). A
disk attached with ro looks writable to the guest, and writing it fails.`,
		Example: `  gondola run -d --name dev --disk-slots 1
  gondola disk attach dev env.img,ro`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageError{errors.New("gondola disk attach takes the machine's name and the disk's path")}
			}
			return nil
		},
		ValidArgsFunction: completeMachineThenFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := diskToAttach(args[1])
			if err != nil {
				return err
			}
			c, err := dial(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer c.Close()
			name, err := c.AttachDisk(cmd.Context(), d)
			if err != nil {
				return fmt.Errorf("machine %s: %w", args[0], err)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), name)
			return err
		},
	}
}

// diskToAttach reads PATH[,OPTION…] of a disk for a slot.
func diskToAttach(s string) (control.Disk, error) {
	d, err := parseDisk(s)
	if err != nil {
		return control.Disk{}, usageError{err}
	}
	if d.Queues != 0 || d.BlockSize != 0 {
		return control.Disk{}, usageError{fmt.Errorf("%s: queues and block are the slot's", s)}
	}
	if d.Path, err = filepath.Abs(d.Path); err != nil {
		return control.Disk{}, err
	}
	return control.Disk{Path: d.Path, ReadOnly: d.ReadOnly, COW: d.COW, Backing: d.Backing, Serial: d.Serial, Limits: d.Limits}, nil
}

func completeMachineThenFile(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 1 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return completeMachine(cmd, args, word)
}

func diskDetachCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "detach NAME DEVICE",
		Short: "Detach a disk from a running machine",
		Long: `Take a disk that gondola disk attach gave away again; unmount it in the guest
first. When the command returns, all that was written is in the file.`,
		Example: "  gondola disk detach dev vda",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageError{errors.New("gondola disk detach takes the machine's name and the disk's in the guest")}
			}
			return nil
		},
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := dial(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer c.Close()
			if err := c.DetachDisk(cmd.Context(), args[1]); err != nil {
				return fmt.Errorf("machine %s: %w", args[0], err)
			}
			return nil
		},
	}
}

func limitsCommand() *cobra.Command {
	var disks, nets []string
	var asJSON bool
	c := &cobra.Command{
		Use:   "limits NAME [--disk DEVICE,LIMIT…] [--net DEVICE,LIMIT…]",
		Short: "Show or change the rate limits of a machine's disks and networks",
		Long: `Show the rate limits and counters of a running machine's disks and networks, after
changing those that are given: DEVICE is the name in the guest, LIMIT one of
` + limitOptions + `. What is not named stays; none takes a limit away.`,
		Example: `  gondola limits dev
  gondola limits dev --disk vda,bps=20M,iops=500
  gondola limits dev --disk vda,bps=none`,
		Args:              oneMachine,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			var change []control.Limit
			for _, s := range append(disks, nets...) {
				l, err := parseLimit(s)
				if err != nil {
					return usageError{err}
				}
				change = append(change, l)
			}
			c, err := dial(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer c.Close()
			devices, err := c.Limits(cmd.Context(), change...)
			if err != nil {
				return fmt.Errorf("machine %s: %w", args[0], err)
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), devices)
			}
			tw := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			printDevices(tw, devices)
			return tw.Flush()
		},
	}
	c.Flags().StringArrayVar(&disks, "disk", nil, "change the limits of a disk (repeatable)")
	c.Flags().StringArrayVar(&nets, "net", nil, "change the limits of a network interface (repeatable)")
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable, with all counters")
	return c
}

// parseLimit reads DEVICE,LIMIT….
func parseLimit(s string) (control.Limit, error) {
	words := strings.Split(s, ",")
	l := control.Limit{Device: words[0]}
	if len(words) < 2 || words[0] == "" {
		return l, fmt.Errorf("%q: want DEVICE,LIMIT…, the limits being %s", s, limitOptions)
	}
	for _, w := range words[1:] {
		name, value, _ := strings.Cut(w, "=")
		var v ratelimit.Limits
		known, err := limitOption(&v, name, value)
		switch {
		case !known:
			return l, fmt.Errorf("%q: the limits are %s", w, limitOptions)
		case err != nil:
			return l, fmt.Errorf("%q: %w", w, err)
		}
		switch name {
		case "bps":
			l.BytesPerSecond = &v.BytesPerSecond
		case "bps-burst":
			l.BytesBurst = &v.BytesBurst
		case "iops":
			l.OpsPerSecond = &v.OpsPerSecond
		case "iops-burst":
			l.OpsBurst = &v.OpsBurst
		}
	}
	return l, nil
}

// printDevices prints devices, their limits and their counters.
func printDevices(w io.Writer, devices []iostat.Info) {
	fmt.Fprintln(w, "DEVICE\tKIND\tSIZE\tREAD\tWRITTEN\tOPS\tERRORS\tMEDIAN\t99%\tLIMITS\tBACKEND")
	for _, d := range devices {
		s := d.Stats
		dsize, detail := "-", orDash(printable(d.Detail))
		if d.Kind == "disk" {
			dsize = size(d.Size)
			if d.Spare && d.Detail == "" {
				detail = "(empty slot)"
			}
			if d.ReadOnly {
				detail += " (ro)"
			}
		}
		all := s.Read
		all.Latency = make([]uint64, iostat.Buckets)
		for _, c := range []iostat.ClassStats{s.Read, s.Write, s.Other} {
			for i, n := range c.Latency {
				if i < len(all.Latency) {
					all.Latency[i] += n
				}
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%d\t%v\t%v\t%s\t%s\n", printable(d.Name), printable(d.Kind), dsize,
			size(s.Read.Bytes), size(s.Write.Bytes), s.Read.Ops+s.Write.Ops+s.Other.Ops, s.Read.Errors+s.Write.Errors+s.Other.Errors,
			all.Quantile(0.5), all.Quantile(0.99), describeLimits(d.Limits), detail)
	}
}

func describeLimits(l ratelimit.Limits) string {
	var words []string
	add := func(name, value string, n uint64) {
		if n != 0 {
			words = append(words, name+"="+value)
		}
	}
	exact := func(n uint64) string { m := memorySize(n); return m.String() }
	add("bps", exact(l.BytesPerSecond), l.BytesPerSecond)
	add("bps-burst", exact(l.BytesBurst), l.BytesBurst)
	add("iops", strconv.FormatUint(l.OpsPerSecond, 10), l.OpsPerSecond)
	add("iops-burst", strconv.FormatUint(l.OpsBurst, 10), l.OpsBurst)
	if len(words) == 0 {
		return "none"
	}
	return strings.Join(words, ",")
}
