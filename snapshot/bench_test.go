package snapshot_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices"
	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/service"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// benchSizes are those of the machines that are saved, in bytes.
var benchSizes = []uint64{128 << 20, 512 << 20, 2 << 30}

// benchDirty are parts of memory that were changed, in per cent.
var benchDirty = []int{1, 10, 100}

// line is as much of a serial port as vmmtest.Dirtying needs. The guest looks at it a
// thousand times a second when it has nothing to do.
type line struct{ in, out chan byte }

func (l *line) Read(off uint64, d []byte) {
	clear(d)
	switch off {
	case 0:
		select {
		case d[0] = <-l.in:
		default:
		}
	case 5:
		if len(l.in) > 0 {
			d[0] = 1
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func (l *line) Write(off uint64, d []byte) {
	if off == 0 {
		l.out <- d[0]
	}
}

func (*line) SaveState() (devices.State, error)       { return devices.State{Version: 1}, nil }
func (*line) LoadState(devices.State) (func(), error) { return func() {}, nil }

// dirtying is a machine of which the guest changes as many pages as it is told.
type dirtying struct {
	*snapshot.Manager
	b    *testing.B
	vm   *vmm.VM
	s    *store.Store
	line *line
}

// newDirtying makes and runs one; unit is how many pages its guest changes for 1.
func newDirtying(b *testing.B, memory uint64, unit uint32) *dirtying {
	needkvm.Test(b)
	s, err := store.Open(filepath.Join(b.TempDir(), "states"), store.Options{Buffer: 128 << 20}) // as gondola run has it
	require.NoError(b, err)
	b.Cleanup(func() { s.Close() })
	l := &line{make(chan byte, 1), make(chan byte, 1)}
	vm, err := vmm.New(vmm.Config{
		Memory: memory, Devices: []vmm.Device{vmm.Ports{Name: "line", Base: 0x3f8, Size: 8, Handler: l}},
		Boot: firmware.Flat{Addr: vmmtest.TinyBase, Mode: firmware.Protected, Image: firmware.Bytes(vmmtest.Dirtying(unit))},
	})
	require.NoError(b, err)
	b.Cleanup(func() { vm.Close() })
	d := &dirtying{b: b, vm: vm, s: s, line: l}
	d.anew()
	b.Cleanup(func() { d.Close() })
	go vm.Run(context.Background())
	return d
}

// anew makes it a machine that has never been saved.
func (d *dirtying) anew() {
	if d.Manager != nil {
		require.NoError(d.b, d.Close())
	}
	d.Manager = snapshot.New(snapshot.Config{VM: d.vm, Store: d.s})
}

// dirty has the guest change n units.
func (d *dirtying) dirty(n int) {
	d.line.in <- byte(n)
	<-d.line.out
}

// sums of what a save or restore took.
type sums struct {
	pause, total time.Duration
	bytes        int64
	n            int
}

func (s *sums) report(b *testing.B) {
	n := float64(s.n)
	b.ReportMetric(s.pause.Seconds()*1e3/n, "pause-ms")
	b.ReportMetric(s.total.Seconds()*1e3/n, "total-ms")
	if s.bytes > 0 {
		b.ReportMetric(float64(s.bytes)/n/(1<<20), "disk-MiB")
	}
	b.ReportMetric(0, "ns/op") // with what is between saves
}

func (s *sums) add(t snapshot.Times, bytes int64) {
	s.pause, s.total, s.bytes, s.n = s.pause+t.Pause, s.total+t.Total, s.bytes+bytes, s.n+1
}

// BenchmarkSave is the saving of a machine all of whose memory is in use: as a whole,
// and as a change of so many per cent of it, while it stands still and while it runs.
// The guest has nothing to do meanwhile. in-place is the way back from the change.
func BenchmarkSave(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("%dMiB", size>>20), func(b *testing.B) {
			d := newDirtying(b, size, vmmtest.DirtyPages(size))
			d.dirty(100)
			ctx := b.Context()
			save := func(b *testing.B, s *sums, name string, still bool) {
				i, t, err := d.Save(ctx, snapshot.SaveOptions{Name: name, Still: still})
				require.NoError(b, err)
				s.add(t, i.Bytes)
			}
			for _, still := range []bool{true, false} {
				mode := map[bool]string{true: "still", false: "live"}[still]
				b.Run("full/"+mode, func(b *testing.B) {
					var s sums
					for b.Loop() {
						d.anew()
						save(b, &s, "x", still)
						require.NoError(b, d.s.Delete(ctx, "x"))
					}
					d.anew() // the file of x goes
					s.report(b)
				})
			}
			var base sums
			save(b, &base, "base", true)
			for _, percent := range benchDirty {
				for _, still := range []bool{true, false} {
					mode := map[bool]string{true: "still", false: "live"}[still]
					var back sums
					b.Run(fmt.Sprintf("%d%%/%s", percent, mode), func(b *testing.B) {
						var s sums
						for b.Loop() {
							d.dirty(percent)
							save(b, &s, "x", still)
							_, t, err := d.Restore(ctx, "base")
							require.NoError(b, err)
							back.add(t, 0)
							require.NoError(b, d.s.Delete(ctx, "x"))
						}
						s.report(b)
					})
					if back.n > 0 && !still {
						b.Run(fmt.Sprintf("%d%%/in-place", percent), func(b *testing.B) {
							for b.Loop() {
							}
							back.report(b)
						})
					}
				}
			}
		})
	}
}

// BenchmarkRestore is one restore in place to the current state by the manager, of a
// machine whose guest has changed so many pages.
func BenchmarkRestore(b *testing.B) {
	for _, pages := range []uint32{10, 100, 1000, 10000} {
		b.Run(fmt.Sprint(pages), func(b *testing.B) {
			d := newDirtying(b, 64<<20, pages)
			d.dirty(1)
			_, _, err := d.Save(b.Context(), snapshot.SaveOptions{Name: "base"})
			require.NoError(b, err)
			var pauses, totals []time.Duration
			for b.Loop() {
				d.dirty(1)
				_, t, err := d.Restore(b.Context(), "base")
				require.NoError(b, err)
				pauses, totals = append(pauses, t.Pause), append(totals, t.Total)
			}
			sum := time.Duration(0)
			for _, t := range totals {
				sum += t
			}
			b.ReportMetric(median(pauses), "pause-p50-µs")
			b.ReportMetric(median(totals), "total-p50-µs")
			b.ReportMetric(float64(len(totals))/sum.Seconds(), "restores/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// median in microseconds.
func median(d []time.Duration) float64 {
	slices.Sort(d)
	return float64(d[len(d)/2].Nanoseconds()) / 1e3
}

// BenchmarkVmstateSave is the time from the start of "vmstate save --wait" in a Linux
// guest to its end, as a program there sees it, and of "vmstate status", which asks
// nothing of the monitor.
func BenchmarkVmstateSave(b *testing.B) {
	g := vmmtest.Boot(b, guest.Config{Ports: true, Userland: initramfs.UserlandBusybox})
	s, err := store.Open(filepath.Join(b.TempDir(), "states"), store.Options{Buffer: 64 << 20})
	require.NoError(b, err)
	defer s.Close()
	m := snapshot.New(snapshot.Config{VM: g.VM(), Store: s, Restored: g.Renew})
	defer m.Close()
	requests := service.New(service.Config{Auth: anybody{}, Ops: snapshot.Ops(func(context.Context) (*snapshot.Manager, error) { return m, nil })})
	defer requests.Close()
	for _, c := range g.Carriers() {
		require.NoError(b, requests.Attach(c.Name, c.A, c.B))
	}
	const rounds = 5
	in := func(script string) time.Duration {
		var out bytes.Buffer
		c := guestagent.Command{
			Args: []string{"sh", "-c", "now() { read u x </proc/uptime; u=${u%.*}${u#*.}; }; now; was=$u; for i in 1 2 3 4 5; do " + script + " || exit; done; now; echo $((u-was))"},
			Env:  []string{"GONDOLA_PRINCIPAL=app", "GONDOLA_SECRET=s3cret"}, Stdout: &out, Stderr: &out,
		}
		require.Zero(b, g.Exec(b, c).Code, out.String())
		var hundredths int
		_, err := fmt.Sscan(out.String(), &hundredths)
		require.NoError(b, err, out.String())
		return time.Duration(hundredths) * 10 * time.Millisecond / rounds
	}
	n := 0
	var saves, status time.Duration
	for b.Loop() {
		n++
		saves += in(fmt.Sprintf("vmstate save s%d-$i --wait >/dev/null", n))
		status += in("vmstate status >/dev/null")
	}
	list, err := s.List(b.Context())
	require.NoError(b, err)
	bytes := int64(0)
	for _, i := range list[1:] {
		bytes += i.Bytes
	}
	b.ReportMetric(saves.Seconds()*1e3/float64(n), "save-ms")
	b.ReportMetric(status.Seconds()*1e3/float64(n), "status-ms")
	b.ReportMetric(float64(list[0].Bytes)/(1<<20), "first-disk-MiB")
	b.ReportMetric(float64(bytes)/float64(len(list)-1)/(1<<20), "next-disk-MiB")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkQEMU is what QEMU takes for savevm and loadvm of the guest that BenchmarkSave
// saves: a qcow2 file beside the same store's directory, KVM where there is one (else
// TCG, which is in the name). The machine stands still for all of it.
func BenchmarkQEMU(b *testing.B) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	require.NoError(b, err, "the peer is missing: .ci/deps --bench")
	accel := "kvm"
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		accel = "tcg"
	} else {
		f.Close()
	}
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("%dMiB/%s", size>>20, accel), func(b *testing.B) {
			dir := b.TempDir()
			kernel, disk := filepath.Join(dir, "k"), filepath.Join(dir, "d")
			require.NoError(b, os.WriteFile(kernel, vmmtest.TinyPVH(vmmtest.Dirtying(vmmtest.DirtyPages(size))), 0o600))
			out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", disk, "1M").CombinedOutput()
			require.NoError(b, err, "%s", out)
			var stderr bytes.Buffer
			// A PC as gondola's machine is one; without the BIOS's screen and options.
			cmd := exec.Command(qemu, "-M", "pc,hpet=off", "-accel", accel, "-m", fmt.Sprintf("%dM", size>>20), "-nodefaults", "-no-user-config", "-display", "none",
				"-kernel", kernel, "-drive", "if=none,id=d,format=qcow2,file="+disk,
				"-serial", "unix:"+filepath.Join(dir, "serial")+",server=on,wait=off", "-qmp", "unix:"+filepath.Join(dir, "qmp")+",server=on,wait=off")
			cmd.Stderr = &stderr
			require.NoError(b, cmd.Start())
			defer func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait() // killed
			}()
			serial, monitor := dialSocket(b, filepath.Join(dir, "serial"), &stderr), newMonitor(b, dialSocket(b, filepath.Join(dir, "qmp"), &stderr))
			dirty := func(percent byte) {
				// It may not listen yet: what is sent then is lost.
				_, err := serial.Write([]byte{percent})
				require.NoError(b, err)
				one := make([]byte, 1)
				_, err = io.ReadFull(serial, one)
				require.NoError(b, err, stderr.String())
			}
			time.Sleep(3 * time.Second) // the BIOS
			dirty(100)
			var saves, loads []time.Duration
			for b.Loop() {
				dirty(1)
				saves = append(saves, monitor.do("savevm x"))
				dirty(1)
				loads = append(loads, monitor.do("loadvm x"))
			}
			fi, err := os.Stat(disk)
			require.NoError(b, err)
			b.ReportMetric(median(saves)/1e3, "savevm-ms")
			b.ReportMetric(median(loads)/1e3, "loadvm-ms")
			b.ReportMetric(float64(fi.Size())/(1<<20), "disk-MiB")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func dialSocket(b *testing.B, path string, stderr *bytes.Buffer) net.Conn {
	for i := 0; ; i++ {
		c, err := net.Dial("unix", path)
		if err == nil {
			b.Cleanup(func() { c.Close() })
			require.NoError(b, c.SetDeadline(time.Now().Add(10*time.Minute)))
			return c
		}
		require.Less(b, i, 300, "%v: %s", err, stderr)
		time.Sleep(100 * time.Millisecond)
	}
}

// monitor is QEMU's, by QMP.
type monitor struct {
	b     *testing.B
	c     net.Conn
	lines *bufio.Scanner
}

func newMonitor(b *testing.B, c net.Conn) *monitor {
	m := &monitor{b, c, bufio.NewScanner(c)}
	m.ask(`{"execute":"qmp_capabilities"}`)
	return m
}

// ask returns the answer to a command.
func (m *monitor) ask(command string) json.RawMessage {
	_, err := io.WriteString(m.c, command+"\n")
	require.NoError(m.b, err)
	for m.lines.Scan() {
		var a struct {
			Return json.RawMessage `json:"return"`
			Error  json.RawMessage `json:"error"`
		}
		require.NoError(m.b, json.Unmarshal(m.lines.Bytes(), &a))
		require.Nil(m.b, a.Error, "%s: %s", command, a.Error)
		if a.Return != nil {
			return a.Return
		}
	}
	m.b.Fatalf("%s: no answer: %v", command, m.lines.Err())
	return nil
}

// do performs a command of the monitor for people and returns how long it took.
func (m *monitor) do(command string) time.Duration {
	begin := time.Now()
	said := m.ask(`{"execute":"human-monitor-command","arguments":{"command-line":"` + command + `"}}`)
	took := time.Since(begin)
	var text string
	require.NoError(m.b, json.Unmarshal(said, &text))
	require.Empty(m.b, strings.TrimSpace(text), command)
	return took
}
