package vmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/vmm/kvm"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Results of a probe step.
const (
	// ProbeRuns: KVM executed the instruction.
	ProbeRuns = "runs"
	// ProbeFaults: the processor has no such instruction; the guest saw an
	// exception.
	ProbeFaults = "faults"
	// ProbeFails: KVM gave up; gondola completes the instruction.
	ProbeFails = "fails"
)

// ProbeStep is what the probe guest found out about one instruction in ring 0.
type ProbeStep struct {
	Name    string `json:"name"`
	Result  string `json:"result"`
	Meaning string `json:"meaning,omitempty"` // if the result is ProbeFails
}

// HostReport is what the probe guest found out about this host's KVM.
type HostReport struct {
	Kind HostKind `json:"-"`
	// Host is Kind for people and machines: "hardware" or "pvm".
	Host  string        `json:"host"`
	Steps []ProbeStep   `json:"steps"`
	Took  time.Duration `json:"took_ns"`
}

// Probe runs the probe guest and tells what kind of host this is, by behaviour.
func Probe() (HostReport, error) {
	start := time.Now()
	sys, err := kvm.Open()
	if err != nil {
		return HostReport{}, err
	}
	defer sys.Close()
	var r HostReport
	done := make(chan struct{})
	go func() { // a thread of its own, which may be the vCPU's
		defer close(done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		r, err = probe(sys)
	}()
	<-done
	r.Took = time.Since(start)
	return r, err
}

// probe runs the probe guest on the calling thread.
func probe(sys *kvm.System) (r HostReport, err error) {
	m, err := mem.New(mem.MinSize, mem.Options{})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, m.Unmap()) }()
	entry, err := firmware.Probe{}.Load(firmware.Machine{Memory: m, VCPUs: 1})
	if err != nil {
		return r, err
	}
	runSize, err := sys.RunSize()
	if err != nil {
		return r, err
	}
	cpuid, err := sys.SupportedCPUID()
	if err != nil {
		return r, err
	}
	vm, err := sys.CreateVM()
	if err != nil {
		return r, err
	}
	defer vm.Close()
	if err := mapMemory(vm, m, 0); err != nil {
		return r, err
	}
	k, err := vm.CreateVCPU(0, runSize)
	if err != nil {
		return r, err
	}
	defer k.Close()
	if err := k.SetCPUID(cpuid); err != nil {
		return r, err
	}
	if err := enter(k, entry); err != nil {
		return r, err
	}

	steps := firmware.ProbeSteps()
	results := make([]string, len(steps)-1)
	r.Kind = HostHardware
	next := 0
	for range 4 * len(steps) { // more exits than a well-behaved host can make
		if err := k.Run(); err != nil {
			if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
				continue
			}
			return r, fmt.Errorf("probe guest: KVM_RUN: %w", err)
		}
		switch k.RunArea().ExitReason {
		case kvm.ExitIO:
			io, ok := k.IO()
			if !ok || !io.Out || io.Port != firmware.ProbePort || len(io.Data) != 1 {
				return r, fmt.Errorf("%w: the probe guest made an unexpected port access", ErrKVM)
			}
			v := io.Data[0]
			if v == firmware.ProbeDone {
				for i, s := range steps[:len(results)] {
					p := ProbeStep{Name: s.Name, Result: results[i]}
					if p.Result == ProbeFails {
						p.Meaning = s.Meaning
					}
					r.Steps = append(r.Steps, p)
				}
				r.Host = r.Kind.String()
				return r, nil
			}
			i := int(v &^ firmware.ProbeFault)
			if i != next || i >= len(results) {
				return r, fmt.Errorf("%w: the probe guest reported step %d instead of %d", ErrKVM, i, next)
			}
			if results[i] = ProbeRuns; v&firmware.ProbeFault != 0 {
				results[i] = ProbeFaults
			}
			next++
		case kvm.ExitInternalError:
			if next >= len(results) || next == 0 {
				sub, data, _ := k.InternalError()
				return r, fmt.Errorf("%w: %s (internal error %d, data %#x)", ErrKVM, steps[0].Meaning, sub, data)
			}
			r.Kind = HostPVM
			results[next] = ProbeFails
			next++
			var regs kvm.Regs
			if err := k.Regs(&regs); err != nil {
				return r, err
			}
			regs.RIP = uint64(firmware.ProbeAddr) + steps[next].Offset
			if err := k.SetRegs(&regs); err != nil {
				return r, err
			}
		default:
			return r, fmt.Errorf("%w: the probe guest ended with %s", ErrKVM, k.RunArea().ExitReason)
		}
	}
	return r, fmt.Errorf("%w: the probe guest does not end", ErrKVM)
}

// Kind is the kind of this host, found out by the probe guest once for each boot of
// the host.
func Kind() (HostKind, error) { return hostKind(HostAuto) }

// hostKind resolves HostAuto. The probe's answer is kept for the process, and for
// the boot of the host in a file of the user's cache.
func hostKind(k HostKind) (HostKind, error) {
	if k != HostAuto {
		return k, nil
	}
	return probedKind()
}

var probedKind = sync.OnceValues(func() (HostKind, error) {
	file := probeCache()
	if b, err := os.ReadFile(file); err == nil {
		var r HostReport
		if json.Unmarshal(b, &r) == nil {
			switch r.Host {
			case HostHardware.String():
				return HostHardware, nil
			case HostPVM.String():
				return HostPVM, nil
			}
		}
	}
	r, err := Probe()
	if err != nil {
		return HostAuto, err
	}
	// The cache only saves time: what goes wrong with it does not matter.
	if b, err := json.Marshal(r); err == nil && file != "" && os.MkdirAll(filepath.Dir(file), 0o700) == nil {
		tmp := fmt.Sprintf("%s.%d", file, os.Getpid())
		if os.WriteFile(tmp, b, 0o600) == nil && os.Rename(tmp, file) != nil {
			os.Remove(tmp)
		}
	}
	return r.Kind, nil
})

// probeCache is the file that keeps the probe's answer until the host boots
// again or /dev/kvm changes hands (a module loaded anew); "" if there is no place
// for one.
func probeCache() string {
	dir := os.Getenv("GONDOLA_CACHE")
	if dir == "" {
		d, err := os.UserCacheDir()
		if err != nil {
			return ""
		}
		dir = filepath.Join(d, "gondola")
	}
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	var st unix.Stat_t
	if err != nil || unix.Stat(kvm.Device, &st) != nil {
		return ""
	}
	return filepath.Join(dir, "host", fmt.Sprintf("%s-%x-%x.json", strings.TrimSpace(string(id)), st.Ino, st.Ctim.Nano()))
}
