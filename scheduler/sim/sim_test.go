package sim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/scheduler"
)

func simulate(t testing.TB, tr *Trace, policy string, hosts int, capacity scheduler.Amounts) *Result {
	t.Helper()
	r, err := Run(context.Background(), tr, Config{Policy: policy, Hosts: hosts, Host: capacity})
	require.NoError(t, err)
	return r
}

func synthetic(t testing.TB, s string) *Trace {
	t.Helper()
	y, err := ParseSynthetic(s)
	require.NoError(t, err)
	return y.Trace()
}

var host8 = scheduler.Amounts{scheduler.CPU: 4, scheduler.Net: 100 << 20, scheduler.Disk: 100 << 20}

func TestSame(t *testing.T) {
	for _, p := range []string{"linux", "activity"} {
		a := simulate(t, synthetic(t, "machines=60,seconds=3"), p, 4, host8)
		b := simulate(t, synthetic(t, "machines=60,seconds=3"), p, 4, host8)
		assert.Equal(t, a, b, "the same every time")
		assert.NotEqual(t, a.Events, simulate(t, synthetic(t, "machines=60,seconds=3,seed=2"), p, 4, host8).Events)
	}
}

// What is simulated is what can be computed: hogs fill the host, sleepers take what
// they want, nobody gets what is not there.
func TestConservation(t *testing.T) {
	for _, p := range []string{"linux", "roundrobin", "priority", "activity"} {
		r := simulate(t, synthetic(t, "machines=12,seconds=5,hog=1"), p, 1, host8)
		assert.InDelta(t, 1, r.Utilisation, 0.01, p)
		assert.GreaterOrEqual(t, r.Equals, 0.98, p)
		assert.InDelta(t, 20, r.Work["hog"][scheduler.CPU], 0.2, p)
		for _, u := range r.BySecond {
			assert.LessOrEqual(t, u, 1.0001, p)
		}
		r = simulate(t, synthetic(t, "machines=4,seconds=5,latency=1"), p, 1, host8)
		assert.InDelta(t, 4*0.1/4, r.Utilisation, 0.012, "%s: a tenth of a processor each", p)
		assert.Less(t, r.Latency["latency"].P99, 3*time.Millisecond, p)
	}
}

// The goal of S2: a latency-sensitive machine beside hogs waits for a fifth of the
// time, or less, and the hogs lose nothing to speak of.
func TestActivityAgainstLinux(t *testing.T) {
	one := scheduler.Amounts{scheduler.CPU: 1}
	for _, hogs := range []int{1, 2, 4} {
		tr := synthetic(t, "machines=1,seconds=20,latency=1")
		tr.Machines = append(tr.Machines, synthetic(t, "machines=4,seconds=20,hog=1").Machines[:hogs]...)
		lin, rr, act := simulate(t, tr, "linux", 1, one), simulate(t, tr, "roundrobin", 1, one), simulate(t, tr, "activity", 1, one)
		assert.LessOrEqual(t, act.Latency["latency"].P99*5, rr.Latency["latency"].P99, "%d hogs", hogs)
		assert.LessOrEqual(t, act.Latency["latency"].P99, lin.Latency["latency"].P99, "%d hogs", hogs)
		assert.GreaterOrEqual(t, act.Work["hog"][scheduler.CPU], 0.95*lin.Work["hog"][scheduler.CPU])
	}
}

// Work orders help those that wait, and come to an end: what is wanted steadily leads to
// steady allocations, with the scheduler beside them and without (S4.7, S4.10).
func TestOrders(t *testing.T) {
	for _, policy := range []string{"linux", "activity"} {
		for seed := range 2 {
			tr := synthetic(t, fmt.Sprintf("machines=4,seconds=450,seed=%d,hog=3,latency=1", seed+1))
			cfg := Config{Policy: policy, Hosts: 1, Host: scheduler.Amounts{scheduler.CPU: 2}}
			before, err := Run(t.Context(), tr, cfg)
			require.NoError(t, err)
			require.Zero(t, before.Orders)
			cfg.Orders = time.Second
			r, err := Run(t.Context(), tr, cfg)
			require.NoError(t, err)
			assert.Positive(t, r.Orders, policy)
			assert.LessOrEqual(t, r.Orders, r.OrdersKept+r.OrdersRolledBack+1)
			assert.LessOrEqual(t, r.OrdersLate, 2*len(tr.Machines), "%s, seed %d: %d made, %d kept, %d rolled back", policy, seed, r.Orders, r.OrdersKept, r.OrdersRolledBack)
			assert.GreaterOrEqual(t, r.Utilisation, before.Utilisation-0.01)
		}
	}
}

func TestRecordAndReplay(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t.jsonl")
	r, err := OpenRecorder(path, host8)
	require.NoError(t, err)
	s := scheduler.New(scheduler.Config{Capacity: host8})
	now := time.Unix(1e9, 0)
	for i := range uint64(5) {
		obs := []scheduler.Observation{{Spec: scheduler.Spec{Name: "a", VCPUs: 2}, Sample: scheduler.Sample{Time: now, Run: i * 1e9, Wait: i * 5e8, NetBytes: i << 20, Wakes: i * 100}}}
		if i == 4 {
			obs = nil
		}
		p := s.Step(now, obs)
		require.NoError(t, r.Add(now, s, p))
		now = now.Add(time.Second)
	}
	require.NoError(t, r.Close())
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	tr, err := Read(bytes.NewReader(b))
	require.NoError(t, err)
	assert.Equal(t, host8, tr.Capacity)
	require.Len(t, tr.Machines, 1)
	ph := tr.Machines[0].Phases
	require.Len(t, ph, 4)
	assert.InDelta(t, 1.5, ph[0].CPU, 1e-6)
	assert.InDelta(t, 50, ph[0].Wakes, 1e-6)
	assert.True(t, ph[3].Gone)
	res := simulate(t, tr, "activity", 1, host8)
	assert.InDelta(t, 1.5*3, res.Work[""][scheduler.CPU], 0.1)
	// A cut line is the end, garbage in the middle is not.
	_, err = Read(bytes.NewReader(append(b, `{"t":`...)))
	require.NoError(t, err)
	for _, bad := range []string{"", "{}", `{"gondola_trace":2}`, `{"gondola_trace":1}`, "{\"gondola_trace\":1}\ngarbage\n" + string(b), "{\"gondola_trace\":1}\n{\"machine\":\"a\",\"vcpus\":0}\n",
		"{\"gondola_trace\":1}\n{\"machine\":\"a\",\"vcpus\":1,\"t\":5}\n{\"machine\":\"a\",\"vcpus\":1,\"t\":4}\n"} {
		_, err := Read(strings.NewReader(bad))
		assert.ErrorIs(t, err, ErrTrace, "%q", bad)
	}
}

func TestSyntheticRefuses(t *testing.T) {
	for _, bad := range []string{"machines=0", "machines=1e9", "seconds=0", "seconds=1e9", "cats=3", "hog=-1", "hog", "seed=NaN"} {
		_, err := ParseSynthetic(bad)
		assert.Error(t, err, bad)
	}
	_, err := Run(context.Background(), synthetic(t, ""), Config{Policy: "astrology", Host: host8})
	assert.Error(t, err)
	_, err = Run(context.Background(), synthetic(t, ""), Config{Policy: "linux"})
	assert.Error(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = Run(ctx, synthetic(t, ""), Config{Policy: "linux", Host: host8})
	assert.ErrorIs(t, err, context.Canceled)
}

// FuzzTrace: any file is refused, or simulated to its end.
func FuzzTrace(f *testing.F) {
	add := func(ls ...string) { f.Add([]byte("{\"gondola_trace\":1}\n" + strings.Join(ls, "\n"))) }
	add(`{"machine":"a","vcpus":2,"shares":0,"t":0,"cpu":1.5,"net":1e6,"wakes":100}`, `{"machine":"a","vcpus":2,"t":0.5,"gone":true}`)
	add(`{"machine":"b","vcpus":1,"t":0,"cpu":1e12,"disk":1e12,"wakes":1e12}`, `{"machine":"b","vcpus":1,"t":0.1,"cpu":0.3,"wakes":0}`)
	f.Fuzz(func(t *testing.T, b []byte) {
		tr, err := Read(bytes.NewReader(b))
		if err != nil {
			return
		}
		tr.Length = min(tr.Length, 50*time.Millisecond)
		if len(tr.Machines) > 20 {
			tr.Machines = tr.Machines[:20]
		}
		for _, p := range []string{"linux", "activity"} {
			r := simulate(t, tr, p, 1, host8)
			_, err := json.Marshal(r)
			require.NoError(t, err)
			require.LessOrEqual(t, r.Utilisation, 1.0001)
		}
	})
}

// BenchmarkHosts is one simulated second of 20 hosts with 20 machines each.
func BenchmarkHosts(b *testing.B) {
	for _, p := range []string{"linux", "activity"} {
		b.Run(p, func(b *testing.B) {
			tr := synthetic(b, "machines=400,seconds=1")
			var events uint64
			for b.Loop() {
				events += simulate(b, tr, p, 20, host8).Events
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(events), "ns/event")
		})
	}
}
