package vmm_test

import (
	"context"
	"encoding/binary"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/vmm"
)

type sink struct{ last byte }

func (s *sink) Read(_ uint64, d []byte)  { clear(d) }
func (s *sink) Write(_ uint64, d []byte) { s.last = d[0] }

// BenchmarkExit is the round trip of one exit, from guest to handler and back.
// x/C is its ratio to the smallest C loop around KVM_RUN with the same guest
// (testdata/bench/exitloop.c), measured right before and right after; the goal is
// 1.05.
func BenchmarkExit(b *testing.B) {
	c := filepath.Join(b.TempDir(), "exitloop")
	out, err := exec.Command("gcc", "-O2", "-o", c, "../testdata/bench/exitloop.c").CombinedOutput()
	require.NoError(b, err, "%s", out)
	for _, tc := range []struct {
		name string
		dev  vmm.Device
		code []byte // of the access
	}{
		{"pio", vmm.Ports{Name: "sink", Base: 0x90, Size: 1, Handler: &sink{}}, []byte{0xe6, 0x90}},
		{"mmio", vmm.Window{Name: "sink", Base: 0xd8000000, Size: 4, Handler: &sink{}}, []byte{0xa2, 0, 0, 0, 0xd8}},
	} {
		b.Run(tc.name, func(b *testing.B) {
			peer := func() float64 {
				out, err := exec.Command(c, tc.name, strconv.Itoa(b.N)).Output()
				require.NoError(b, err)
				ns, err := strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
				require.NoError(b, err)
				return ns
			}
			// mov esi, N; again: access; dec esi; jnz again; hlt
			code := binary.LittleEndian.AppendUint32([]byte{0xbe}, uint32(b.N))
			code = append(code, tc.code...)
			code = append(code, 0x4e, 0x75, byte(-(len(tc.code) + 3)), 0xf4)
			vm := newVM(b, vmm.Config{
				Platform: vmm.Bare,
				Boot:     firmware.Flat{Image: firmware.Bytes(code), Addr: 0x1000, Mode: firmware.Protected},
				Devices:  []vmm.Device{tc.dev},
			})
			before := peer()
			b.ReportAllocs()
			b.ResetTimer()
			e := vm.Run(context.Background())
			b.StopTimer()
			require.Equal(b, vmm.Halted, e.Reason, "%v", e)
			ns := float64(b.Elapsed().Nanoseconds()) / float64(b.N)
			b.ReportMetric(ns*2/(before+peer()), "x/C")
		})
	}
}

// BenchmarkPause is the time to bring a machine's vCPU out of the guest, while it
// sleeps in HLT or spins (ns/pause; ns/op has the way back and a rest in it).
func BenchmarkPause(b *testing.B) {
	for name, g := range map[string]firmware.Boot{"halted": sleep, "spinning": spin} {
		b.Run(name, func(b *testing.B) {
			vm := newVM(b, vmm.Config{Boot: g})
			ctx := context.Background()
			done := start(ctx, vm)
			var took time.Duration
			for b.Loop() {
				time.Sleep(200 * time.Microsecond) // so that the vCPU is in the guest
				from := time.Now()
				if err := vm.Pause(ctx); err != nil {
					b.Fatal(err)
				}
				took += time.Since(from)
				if err := vm.Resume(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(took.Nanoseconds())/float64(b.N), "ns/pause")
			vm.Stop()
			<-done
		})
	}
}

// BenchmarkMachine is the life of a tiny machine: made, run to its first exit,
// closed.
func BenchmarkMachine(b *testing.B) {
	for name, cfg := range map[string]vmm.Config{
		"pc":   {Boot: exit42, Memory: 128 << 20},
		"bare": {Boot: halt, Memory: 128 << 20, Platform: vmm.Bare},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				vm, err := vmm.New(cfg)
				if err != nil {
					b.Fatal(err)
				}
				if e := vm.Run(context.Background()); e.Reason != vmm.Exited && e.Reason != vmm.Halted {
					b.Fatal(e)
				}
				if err := vm.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
