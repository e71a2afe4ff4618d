package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/mem"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// envBenchBinary names the program to measure, with the agent inside (make build).
const envBenchBinary = "GONDOLA_BENCH_BINARY"

// benchBinary is that program, or one that is built now.
func benchBinary(b *testing.B) string {
	if bin := os.Getenv(envBenchBinary); bin != "" {
		return bin
	}
	bin := filepath.Join(b.TempDir(), "gondola")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(b, err, "%s", out)
	return bin
}

// firstG is the time from the start of a process to the first byte of its guest, G. The
// process's input stays open and has nothing.
func firstG(b *testing.B, name string, args ...string) time.Duration {
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	require.NoError(b, err)
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	require.NoError(b, err)
	from := time.Now()
	require.NoError(b, cmd.Start())
	watchdog := time.AfterFunc(60*time.Second, func() { _ = cmd.Process.Kill() })
	var one [1]byte
	_, err = io.ReadFull(stdout, one[:])
	took := time.Since(from)
	watchdog.Stop()
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // killed
	require.NoError(b, err, "%s: no output from the guest: %s", name, stderr.String())
	require.Equal(b, "G", string(one[:]))
	return took
}

// medianMillis of durations.
func medianMillis(d []time.Duration) float64 {
	slices.Sort(d)
	return float64(d[len(d)/2].Microseconds()) / 1e3
}

// BenchmarkStart is the time from the start of a process to the first instruction
// of its guest, a tiny PVH kernel that writes a byte to the serial port: gondola,
// and QEMU's smallest machine with the same guest in the same run. x/qemu is the
// ratio; the goal is 0.25.
func BenchmarkStart(b *testing.B) {
	bin := benchBinary(b)
	kernel := filepath.Join(b.TempDir(), "tiny.elf")
	require.NoError(b, os.WriteFile(kernel, vmmtest.TinyPVH(vmmtest.Hello), 0o600))
	qemu, err := exec.LookPath("qemu-system-x86_64")
	require.NoError(b, err, "the peer is missing: .ci/deps --bench")

	var ours, theirs time.Duration
	n := 0
	for b.Loop() {
		ours += firstG(b, bin, "run", "-q", "--kernel", kernel, "--initrd", "none", "--console", "serial")
		theirs += firstG(b, qemu, "-M", "microvm,isa-serial=on", "-accel", "kvm", "-m", "128", "-nodefaults", "-no-user-config",
			"-display", "none", "-serial", "stdio", "-kernel", kernel)
		n++
	}
	b.ReportMetric(float64(ours.Microseconds())/1e3/float64(n), "gondola-ms")
	b.ReportMetric(float64(theirs.Microseconds())/1e3/float64(n), "qemu-ms")
	b.ReportMetric(float64(ours)/float64(theirs), "x/qemu")
}

// BenchmarkStartState is the same for a machine that goes on from a state in which all
// of its memory is in use: gondola run --from. The state has been verified before. x/start
// is the ratio to the start of an empty machine, in the same run.
func BenchmarkStartState(b *testing.B) {
	needkvm.Test(b)
	bin := benchBinary(b)
	kernel := filepath.Join(b.TempDir(), "tiny.elf")
	require.NoError(b, os.WriteFile(kernel, vmmtest.TinyPVH(vmmtest.Waiting), 0o600))
	for _, size := range []uint64{128 << 20, 512 << 20, 2 << 30} {
		b.Run(fmt.Sprintf("%dMiB", size>>20), func(b *testing.B) {
			b.Setenv(envStates, filepath.Join(b.TempDir(), "states"))
			saveWaiting(b, kernel, size)
			firstG(b, bin, "run", "-q", "--from", "m@s")
			var starts, empty []time.Duration
			for b.Loop() {
				starts = append(starts, firstG(b, bin, "run", "-q", "--from", "m@s"))
				empty = append(empty, firstG(b, bin, "run", "-q", "--kernel", kernel, "--initrd", "none", "--console", "serial"))
			}
			b.ReportMetric(medianMillis(starts), "state-ms")
			b.ReportMetric(medianMillis(empty), "start-ms")
			b.ReportMetric(medianMillis(starts)/medianMillis(empty), "x/start")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// saveWaiting makes state s of a machine m that is about to write a G, and has something
// in all of its memory.
func saveWaiting(b *testing.B, kernel string, size uint64) {
	cfg := guest.Config{Name: "m", Kernel: kernel, Initrd: guest.NoInitrd, Memory: size, Console: guest.SerialConsole, NoBalloon: true}
	g, err := guest.Start(b.Context(), cfg)
	require.NoError(b, err)
	defer g.Close()
	for i := 0; len(g.Log()) == 0; i++ {
		require.Less(b, i, 1000, "no output")
		time.Sleep(10 * time.Millisecond)
	}
	full := bytes.Repeat([]byte("something"), (1<<20)/9+1)[:1<<20]
	for at := uint64(2 << 20); at < size; at += uint64(len(full)) {
		require.NoError(b, g.VM().Memory().WriteAt(full, mem.Addr(at)))
	}
	// The guest goes on when it does: from the state.
	require.NoError(b, g.VM().Pause(b.Context()))
	require.NoError(b, g.VM().Memory().WriteAt([]byte{1}, vmmtest.WaitingFlag))
	s, err := openStates("m", true, store.Options{})
	require.NoError(b, err)
	defer s.Close()
	m := snapshot.New(snapshot.Config{VM: g.VM(), Store: s, Machine: map[string]string{machineShape: cfg.Shape().String()}})
	defer m.Close()
	_, _, err = m.Save(context.Background(), snapshot.SaveOptions{Name: "s", Last: true})
	require.NoError(b, err)
}

// BenchmarkRunTrue is gondola run -- true from the command's start to its end, with a
// boot and from the state that is kept after one, and gondola exec of the same in a
// machine that runs.
func BenchmarkRunTrue(b *testing.B) {
	needkvm.Test(b)
	bin := benchBinary(b)
	b.Setenv("XDG_RUNTIME_DIR", b.TempDir())
	run := func(args ...string) time.Duration {
		cmd := exec.Command(bin, args...)
		begin := time.Now()
		out, err := cmd.CombinedOutput()
		took := time.Since(begin)
		require.NoError(b, err, "%s: %s", strings.Join(args, " "), out)
		return took
	}
	kind := []string{"run", "-q", "--userland", "busybox"}
	of := func(args ...string) []string { return append(slices.Clone(kind), args...) }
	run(of("--", "true")...) // keeps the state
	run(of("-d", "--name", "bench")...)
	defer run("stop", "--kill", "bench")
	var cold, warm, exec []time.Duration
	for b.Loop() {
		cold = append(cold, run(of("--cold", "--", "true")...))
		warm = append(warm, run(of("--", "true")...))
		exec = append(exec, run("exec", "bench", "--", "true"))
	}
	b.ReportMetric(medianMillis(cold), "cold-ms")
	b.ReportMetric(medianMillis(warm), "warm-ms")
	b.ReportMetric(medianMillis(exec), "exec-ms")
	b.ReportMetric(0, "ns/op")
}
