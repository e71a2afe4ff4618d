package guest_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// BenchmarkBoot boots a Linux guest of one vCPU and 128 MiB and reports the stages:
// load (machine made, memory loaded), init (from the first KVM_RUN to the first
// system call of /init, PVM hosts only; the goal there is 15 s) and agent (until
// the agent answers), exits, and the VMM's memory beside the guest's (PSS, idle
// guest; the goal is 8 MiB, of which this test binary has its share).
func BenchmarkBoot(b *testing.B) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	var load, user, agent time.Duration
	var exits, pss uint64
	for b.Loop() {
		g, err := guest.Start(ctx, guest.Config{})
		require.NoError(b, err)
		require.NoError(b, g.Ready(ctx))
		s, t := g.VM().Stats(), g.Times()
		load, user, agent = load+t.Load, user+s.UserAfter, agent+t.Boot
		for _, n := range s.Exits {
			exits += n
		}
		pss += vmmPSS(b)
		require.NoError(b, g.Close())
	}
	n := float64(b.N)
	b.ReportMetric(load.Seconds()/n, "load-s")
	b.ReportMetric(user.Seconds()/n, "init-s")
	b.ReportMetric(agent.Seconds()/n, "agent-s")
	b.ReportMetric(float64(exits)/n, "exits")
	b.ReportMetric(float64(pss)/n/(1<<20), "vmm-pss-MiB")
}

// vmmPSS is this process's proportional set size in bytes without the guest's RAM.
func vmmPSS(b *testing.B) (sum uint64) {
	f, err := os.Open("/proc/self/smaps")
	require.NoError(b, err)
	defer f.Close()
	ram := false
	for s := bufio.NewScanner(f); s.Scan(); {
		line := s.Text()
		if strings.Contains(line, "-") && !strings.HasPrefix(line, "Pss") && strings.Contains(strings.Fields(line)[0], "-") {
			ram = strings.Contains(line, "gondola-ram")
		}
		var kb uint64
		if n, _ := fmt.Sscanf(line, "Pss: %d kB", &kb); n == 1 && !ram {
			sum += kb << 10
		}
	}
	return sum
}

// BenchmarkTransport is what crosses between host and guest, in one guest: MiB/s of a
// virtio-serial port each way, raw and as standard input and output of a command of
// the agent's; and round trips: a few bytes through the raw ports and back, the
// agent's ping, and exec of true from end to end.
func BenchmarkTransport(b *testing.B) {
	needkvm.Test(b)
	g := vmmtest.Start(b, guest.Config{Name: "transport", Ports: true, Userland: initramfs.UserlandBusybox})
	require.NoError(b, g.Ready(g.Within(b)))
	g.Sh(b, portScript)
	a, w := g.Carriers()[0].A, g.Carriers()[0].B
	const block = 64 << 10
	buf := make([]byte, block)

	// in runs a command in the guest while f does its part here.
	in := func(b *testing.B, cmd guestagent.Command, f func()) {
		ctx, cancel := context.WithCancel(g.Within(b))
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_, _ = g.Agent().Exec(ctx, cmd) // it is cancelled
		}()
		f()
		b.StopTimer()
		cancel()
		<-ended
	}
	sh := func(script string) guestagent.Command {
		return guestagent.Command{Args: []string{"/bin/sh", "-c", script}}
	}
	read := func(b *testing.B, r io.Reader) {
		_, err := io.ReadFull(r, buf) // the command runs
		require.NoError(b, err)
		b.SetBytes(block)
		for b.Loop() {
			_, err := io.ReadFull(r, buf)
			require.NoError(b, err)
		}
	}
	write := func(b *testing.B, w io.Writer) {
		_, err := w.Write(buf)
		require.NoError(b, err)
		b.SetBytes(block)
		for b.Loop() {
			_, err := w.Write(buf)
			require.NoError(b, err)
		}
	}
	b.Run("from-guest/port", func(b *testing.B) {
		in(b, sh("exec dd if=/dev/zero of=/dev/a bs=64k 2>/dev/null"), func() { read(b, a) })
		for { // the rest of that session
			if _, err := a.Read(buf); err == io.EOF {
				return
			} else {
				require.NoError(b, err)
			}
		}
	})
	b.Run("from-guest/exec", func(b *testing.B) {
		r, out := io.Pipe()
		cmd := sh("exec dd if=/dev/zero bs=64k 2>/dev/null")
		cmd.Stdout = out
		in(b, cmd, func() { read(b, r); r.Close() })
	})
	b.Run("to-guest/port", func(b *testing.B) {
		in(b, sh("exec dd of=/dev/null if=/dev/b bs=64k 2>/dev/null"), func() { write(b, w) })
	})
	b.Run("to-guest/exec", func(b *testing.B) {
		in2, out := io.Pipe()
		cmd := sh("exec dd of=/dev/null bs=64k 2>/dev/null")
		cmd.Stdin = in2
		in(b, cmd, func() { write(b, out); out.Close() })
	})
	b.Run("round-trip/port", func(b *testing.B) {
		small := buf[:32]
		trip := func() {
			_, err := w.Write(small)
			require.NoError(b, err)
			_, err = io.ReadFull(a, small)
			require.NoError(b, err)
		}
		in(b, sh("exec cat /dev/b > /dev/a"), func() {
			trip() // the command runs
			for b.Loop() {
				trip()
			}
		})
	})
	b.Run("round-trip/agent-ping", func(b *testing.B) {
		ctx := g.Within(b)
		for b.Loop() {
			require.NoError(b, g.Agent().Ping(ctx))
		}
	})
	b.Run("round-trip/exec-true", func(b *testing.B) {
		for b.Loop() {
			g.Exec(b, guestagent.Command{Args: []string{"true"}})
		}
	})
}
