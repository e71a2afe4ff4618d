package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/cmd/gondola/agentbin"
	"github.com/gondola-vmm/gondola/firmware/guestkernel"
	agentfind "github.com/gondola-vmm/gondola/guestagent/agentbin"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/kvm"
)

// Results of a check.
const (
	checkOK   = "ok"
	checkWarn = "warning" // gondola works, something does not
	checkFail = "failed"  // gondola does not work
)

// check is one thing that doctor looked at.
type check struct {
	Name   string `json:"name"`
	Result string `json:"result"`
	Detail string `json:"detail"`
	Advice string `json:"advice,omitempty"`
}

// diagnosis is what doctor found.
type diagnosis struct {
	OK     bool            `json:"ok"`
	Host   string          `json:"host,omitempty"` // hardware or pvm
	Checks []check         `json:"checks"`
	Probe  []vmm.ProbeStep `json:"probe,omitempty"`
}

func doctorCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Tell what kind of KVM host this is, what works, and what to do about the rest",
		Long: `Look at /dev/kvm, run the probe guest, and check everything that gondola run
needs. Exit code 0 if guests can run here, 1 if not.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d := diagnose(cmd.Context())
			var err error
			if asJSON {
				err = writeJSON(cmd.OutOrStdout(), d)
			} else {
				err = d.print(cmd.OutOrStdout())
			}
			if err == nil && !d.OK {
				err = exitCode(1)
			}
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	return c
}

func diagnose(ctx context.Context) diagnosis {
	d := diagnosis{OK: true}
	add := func(name, result, detail, advice string) {
		d.Checks = append(d.Checks, check{name, result, detail, advice})
		d.OK = d.OK && result != checkFail
	}

	var u unix.Utsname
	if unix.Uname(&u) == nil {
		add("host", checkOK, fmt.Sprintf("Linux %s, %d processors", unix.ByteSliceToString(u.Release[:]), onlineCPUs()), "")
	}
	if sys, err := kvm.Open(); err != nil {
		what, advice, _ := strings.Cut(err.Error(), ": ")
		add(kvm.Device, checkFail, what, advice)
	} else {
		add(kvm.Device, checkOK, "KVM API 12", "")
		if err := sys.Require(vmm.RequiredCaps()...); err != nil {
			add("KVM capabilities", checkFail, err.Error(), "boot a newer kernel on this host")
		} else {
			add("KVM capabilities", checkOK, fmt.Sprintf("all %d that gondola needs", len(vmm.RequiredCaps())), "")
		}
		sys.Close()
		d.probe(add)
	}

	k, err := guestkernel.Find(guestkernel.Options{})
	switch {
	case err == nil:
		add("guest kernel", checkOK, fmt.Sprintf("%s, %s", k.Release, k.VMLinux), "")
	case errors.Is(err, guestkernel.ErrNotBuilt):
		add("guest kernel", checkWarn, "not built yet", "the first gondola run builds it, or: gondola kernel build")
	default:
		add("guest kernel", checkWarn, err.Error(), "gondola kernel build")
	}
	cache, err := initramfs.DefaultCacheDir()
	if err != nil {
		add("cache", checkFail, err.Error(), "set $GONDOLA_CACHE to a directory")
	} else if b, err := agentfind.Find(ctx, agentbin.Bytes, filepath.Join(cache, "agent")); err != nil {
		add("guest agent", checkFail, err.Error(), "build gondola with make, or set $"+agentfind.Env)
	} else {
		add("guest agent", checkOK, fmt.Sprintf("%.1f MiB", float64(len(b))/(1<<20)), "")
	}
	if p, err := exec.LookPath("busybox"); err != nil {
		add("busybox", checkWarn, "not found", "for --userland busybox: apt-get install busybox-static")
	} else {
		add("busybox", checkOK, p, "")
	}
	return d
}

// probe adds what the probe guest found out.
func (d *diagnosis) probe(add func(name, result, detail, advice string)) {
	r, err := vmm.Probe()
	if err != nil {
		add("probe guest", checkFail, err.Error(), "")
		return
	}
	d.Host, d.Probe = r.Host, r.Steps
	took := r.Took.Round(100 * time.Microsecond)
	if r.Kind == vmm.HostHardware {
		add("kind of host", checkOK, fmt.Sprintf("hardware virtualization (probed in %v)", took), "")
		return
	}
	var fails []string
	for _, s := range r.Steps {
		if s.Result == vmm.ProbeFails {
			fails = append(fails, s.Name)
		}
	}
	add("kind of host", checkOK, fmt.Sprintf("PVM: KVM without hardware support (probed in %v)", took),
		"guest programs run at full speed, the guest's kernel in an emulator, at about a million instructions a second;\n"+
			"keep guests small. gondola completes what the emulator does not know: "+strings.Join(fails, " ")+" …")
}

func (d diagnosis) print(w io.Writer) error {
	mark := map[string]string{checkOK: "ok  ", checkWarn: "warn", checkFail: "FAIL"}
	var b strings.Builder
	for _, c := range d.Checks {
		fmt.Fprintf(&b, "%s  %-17s %s\n", mark[c.Result], c.Name, c.Detail)
		for _, l := range strings.Split(c.Advice, "\n") {
			if l != "" {
				fmt.Fprintf(&b, "      %-17s %s\n", "", l)
			}
		}
	}
	if d.OK {
		b.WriteString("Guests can run here.\n")
	} else {
		b.WriteString("Guests cannot run here.\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func onlineCPUs() int {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(os.Getpid(), &set); err != nil {
		return 0
	}
	return set.Count()
}
