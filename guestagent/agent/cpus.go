//go:build linux

package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/gondola-vmm/gondola/guestagent/procfs"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// cpus performs OpCPUs by the kernel's CPU hotplug (Documentation/core-api/
// cpu_hotplug.rst).
func (a *Agent) cpus(_ *proto.Call, req *proto.CPURequest) (any, error) {
	a.cpusMu.Lock()
	defer a.cpusMu.Unlock()
	now, err := a.readCPUs()
	if err != nil {
		return nil, err
	}
	want, err := wantCPUs(now, req)
	if err != nil {
		return nil, err
	}
	// Those that come first: there is always one to run on.
	for _, n := range want {
		if !slices.Contains(now.Online, n) {
			if err := a.setCPU(n, true); err != nil {
				return nil, err
			}
		}
	}
	for _, n := range slices.Backward(now.Online) {
		if !slices.Contains(want, n) {
			if err := a.setCPU(n, false); err != nil {
				return nil, err
			}
		}
	}
	if !slices.Equal(want, now.Online) {
		if now, err = a.readCPUs(); err != nil {
			return nil, err
		}
	}
	return now, nil
}

// wantCPUs are the processors that shall be online.
func wantCPUs(now proto.CPUs, req *proto.CPURequest) ([]int, error) {
	for _, n := range slices.Concat(req.Off, req.On) {
		if !slices.Contains(now.Present, n) {
			return nil, badRequest(fmt.Sprintf("there is no processor %d; the guest has %v", n, now.Present))
		}
	}
	want := slices.Clone(now.Online)
	for _, n := range req.On {
		if slices.Contains(req.Off, n) {
			return nil, badRequest(fmt.Sprintf("processor %d shall be both on and offline", n))
		}
		if !slices.Contains(want, n) {
			want = append(want, n)
		}
	}
	if slices.Contains(req.Off, 0) {
		return nil, badRequest("processor 0 cannot be taken offline: the kernel needs it for interrupts; choose another")
	}
	want = slices.DeleteFunc(want, func(n int) bool { return slices.Contains(req.Off, n) })
	if len(want) == 0 {
		return nil, badRequest("the last processor cannot be taken offline")
	}
	if req.Count != 0 {
		if req.Count < 1 || req.Count > len(now.Present) {
			return nil, badRequest(fmt.Sprintf("%d processors online: the guest has %d, and its last one stays", req.Count, len(now.Present)))
		}
		for _, n := range now.Present {
			if len(want) < req.Count && !slices.Contains(want, n) && !slices.Contains(req.Off, n) {
				want = append(want, n)
			}
		}
		slices.Sort(want)
		if len(want) < req.Count {
			return nil, badRequest(fmt.Sprintf("%d processors online and %v offline do not go together: the guest has %d", req.Count, req.Off, len(now.Present)))
		}
		for i := len(want) - 1; len(want) > req.Count; i-- {
			if i < 0 {
				return nil, badRequest(fmt.Sprintf("%d processors online, and %v among them and processor 0, do not go together", req.Count, req.On))
			}
			if want[i] != 0 && !slices.Contains(req.On, want[i]) {
				want = slices.Delete(want, i, i+1)
			}
		}
	}
	slices.Sort(want)
	return want, nil
}

func (a *Agent) readCPUs() (c proto.CPUs, err error) {
	for _, f := range []struct {
		name string
		to   *[]int
	}{{"present", &c.Present}, {"online", &c.Online}} {
		b, err := procfs.ReadAll(filepath.Join(a.cfg.CPUDir, f.name))
		if err != nil {
			return c, fmt.Errorf("processors: %w; is /sys mounted?", err)
		}
		if *f.to, err = parseCPUList(strings.TrimSpace(string(b))); err != nil {
			return c, err
		}
	}
	return c, nil
}

// parseCPUList reads a list as the kernel writes it, "0,2-3".
func parseCPUList(s string) (list []int, err error) {
	for part := range strings.SplitSeq(s, ",") {
		a, b, isRange := strings.Cut(part, "-")
		if !isRange {
			b = a
		}
		first, err1 := strconv.ParseUint(a, 10, 16)
		last, err2 := strconv.ParseUint(b, 10, 16)
		if err1 != nil || err2 != nil || last < first || last > proto.MaxCPU || len(list) > 0 && int(first) <= list[len(list)-1] {
			return nil, fmt.Errorf("list of processors not understood: %.64q", s)
		}
		for n := first; n <= last; n++ {
			list = append(list, int(n))
		}
	}
	return list, nil
}

func (a *Agent) setCPU(n int, online bool) error {
	v, what := "0", "offline"
	if online {
		v, what = "1", "online"
	}
	// Not os.WriteFile, which would make the file.
	f, err := os.OpenFile(filepath.Join(a.cfg.CPUDir, "cpu"+strconv.Itoa(n), "online"), os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("processor %d cannot be taken %s: the guest's kernel has no CPU hotplug for it (CONFIG_HOTPLUG_CPU)", n, what)
	}
	if err != nil {
		return fmt.Errorf("processor %d: %w", n, err)
	}
	_, err = f.WriteString(v)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("processor %d cannot be taken %s: %w", n, what, err)
	}
	return nil
}
