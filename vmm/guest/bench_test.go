package guest_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/vmm/guest"
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
