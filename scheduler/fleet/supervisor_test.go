package fleet

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fakes runs machines that are only clocks.
type fakes struct {
	mu      sync.Mutex
	log     []string
	running map[string]*fake
	behave  func(m Machine, start int) behaviour // nil: ready after a second, no end
	starts  map[string]int
	left    map[string]bool // by an earlier supervisor
}

type behaviour struct {
	fail     error         // of Start
	ready    time.Duration // 0: after a second; <0: never
	end      time.Duration // 0: never
	outcome  Outcome
	deaf     bool // does not power off
	found    bool
	stopFail error
}

type fake struct {
	f           *fakes
	name        string
	b           behaviour
	ready, done chan struct{}
	once        sync.Once
	outcome     Outcome
	tuned       []Machine
}

func newFakes(behave func(m Machine, start int) behaviour) *fakes {
	return &fakes{behave: behave, running: map[string]*fake{}, starts: map[string]int{}}
}

func (f *fakes) say(format string, a ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, fmt.Sprintf(format, a...))
}

// Find finds machines that are left over.
func (f *fakes) Find(_ context.Context, m Machine) (Running, error) {
	if !f.left[m.Name] {
		return nil, nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	r := &fake{f: f, name: m.Name, b: behaviour{found: true}, ready: make(chan struct{}), done: make(chan struct{})}
	close(r.ready)
	f.running[m.Name] = r
	return r, nil
}

func (f *fakes) Start(ctx context.Context, m Machine) (Running, error) {
	f.mu.Lock()
	f.starts[m.Name]++
	b := behaviour{}
	if f.behave != nil {
		b = f.behave(m, f.starts[m.Name])
	}
	if f.running[m.Name] != nil {
		panic("two of " + m.Name)
	}
	f.mu.Unlock()
	if b.fail != nil {
		return nil, b.fail
	}
	r := &fake{f: f, name: m.Name, b: b, ready: make(chan struct{}), done: make(chan struct{})}
	f.mu.Lock()
	f.running[m.Name] = r
	f.mu.Unlock()
	f.say("start %s", m.Name)
	if b.ready == 0 {
		b.ready = time.Second
	}
	if b.ready > 0 {
		time.AfterFunc(b.ready, func() { close(r.ready) })
	}
	if b.end > 0 {
		time.AfterFunc(b.end, func() { r.finish(b.outcome) })
	}
	return r, nil
}

func (r *fake) finish(o Outcome) {
	r.once.Do(func() {
		r.f.say("end %s", r.name)
		r.f.mu.Lock()
		delete(r.f.running, r.name)
		r.f.mu.Unlock()
		r.outcome = o
		close(r.done)
	})
}

func (r *fake) PID() int               { return 7 }
func (r *fake) Found() bool            { return r.b.found }
func (r *fake) Ready() <-chan struct{} { return r.ready }
func (r *fake) Done() <-chan struct{}  { return r.done }
func (r *fake) Outcome() Outcome       { return r.outcome }
func (r *fake) Stop(ctx context.Context, timeout time.Duration) error {
	if r.b.stopFail != nil {
		return r.b.stopFail
	}
	wait := 100 * time.Millisecond
	if r.b.deaf {
		wait = timeout
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
	case <-r.done:
	}
	r.finish(Outcome{Known: true})
	return nil
}
func (r *fake) Tune(_ context.Context, m Machine) error {
	r.tuned = append(r.tuned, m)
	return nil
}

func fleetOf(t *testing.T, text string) *Fleet {
	t.Helper()
	o := testOptions()
	o.HostMemory = 0
	f, err := Parse([]byte(text), o)
	require.NoError(t, err)
	return f
}

func states(s *Supervisor) string {
	var words []string
	for _, st := range s.Status() {
		words = append(words, st.Name+" "+string(st.State))
	}
	return strings.Join(words, ", ")
}

func reload(t *testing.T, s *Supervisor, f *Fleet, revive bool) string {
	t.Helper()
	changes, err := s.Reload(t.Context(), f, revive)
	require.NoError(t, err)
	var words []string
	for _, c := range changes {
		words = append(words, c.Machine+" "+string(c.Action))
	}
	return strings.Join(words, ", ")
}

// A supervisor finds what an earlier one has left at once, also what it would not
// start yet, and stops it with the others.
func TestFind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakes(func(Machine, int) behaviour { return behaviour{ready: time.Hour} })
		f.left = map[string]bool{"app": true}
		var texts []string
		var mu sync.Mutex
		s := NewSupervisor(f, func(e Event) {
			mu.Lock()
			defer mu.Unlock()
			texts = append(texts, e.Status.Name+": "+e.Text)
		})
		reload(t, s, fleetOf(t, "machines: {db: , app: {after: db}, web: {after: app}}"), false)
		synctest.Wait()
		assert.Equal(t, "db starting, app running, web starting", states(s))
		assert.Contains(t, texts, "app: found running, process 7")
		s.Stop(t.Context())
		assert.Empty(t, f.running)
		assert.Equal(t, 0, f.starts["app"])
	})
}

// Machines start when those they need are ready, and stop the other way.
func TestOrderOfStartAndStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakes(nil)
		s := NewSupervisor(f, nil)
		begin := time.Now()
		reload(t, s, fleetOf(t, "machines: {web: {after: [app]}, app: {after: db}, db: , side: }"), false)
		require.NoError(t, s.WaitReady(t.Context()))
		assert.Equal(t, 3*time.Second, time.Since(begin))
		assert.Equal(t, "web running, app running, db running, side running", states(s))
		s.Stop(t.Context())
		s.Stop(t.Context())
		assert.ElementsMatch(t, []string{"start db", "start side"}, f.log[:2])
		assert.Equal(t, []string{"start app", "start web", "end web", "end app"}, f.log[2:6])
		assert.Equal(t, "web stopped, app stopped, db stopped, side stopped", states(s))
		_, err := s.Reload(t.Context(), fleetOf(t, "machines: {a: }"), false)
		assert.ErrorIs(t, err, ErrStopped)
		require.NoError(t, s.Wait(t.Context()))
	})
}

// The back-off doubles to its maximum, a long run resets it, and it ends where it
// is to end.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var at []time.Duration
		begin := time.Now()
		f := newFakes(func(m Machine, start int) behaviour {
			at = append(at, time.Since(begin).Round(time.Second))
			switch {
			case start == 4: // runs long
				return behaviour{end: 100 * time.Second, outcome: Outcome{Code: 3, Known: true}}
			case start == 6:
				return behaviour{fail: errors.New("no kernel")}
			}
			return behaviour{end: time.Nanosecond, ready: -1, outcome: Outcome{Code: 1, Known: true}}
		})
		var events []Event
		s := NewSupervisor(f, func(e Event) { events = append(events, e) })
		reload(t, s, fleetOf(t, "machines: {a: {restart: {policy: on-failure, back-off: 1s, back-off-max: 3s, max: 4}}}"), false)
		require.NoError(t, s.Wait(t.Context()))
		synctest.Wait() // for the last event
		// 1 s, 2 s, 3 s, then 100 s of a run, and again 1 s, 2 s, 3 s, 3 s.
		assert.Equal(t, []time.Duration{0, 1 * time.Second, 3 * time.Second, 6 * time.Second, 107 * time.Second, 109 * time.Second, 112 * time.Second, 115 * time.Second}, at)
		st := s.Status()[0]
		assert.Equal(t, Failed, st.State)
		assert.Equal(t, 7, st.Restarts)
		assert.Equal(t, "4 restarts in a row did not help", st.Note)
		assert.Equal(t, &Outcome{Code: 1, Known: true}, st.Last)
		assert.True(t, slices.ContainsFunc(events, func(e Event) bool { return strings.Contains(e.Text, "no kernel; restart in 3s") }))
	})
}

func TestRestartPolicies(t *testing.T) {
	good, bad, killed := Outcome{Known: true}, Outcome{Known: true, Code: 1}, Outcome{}
	for _, tc := range []struct {
		policy RestartPolicy
		o      Outcome
		again  bool
	}{
		{RestartNever, bad, false}, {RestartOnFailure, good, false}, {RestartOnFailure, bad, true}, {RestartOnFailure, killed, true},
		{RestartAlways, good, true}, {RestartAlways, bad, true}, {"", bad, false},
	} {
		h := History{}
		again, wait, why := Restart{Policy: tc.policy}.Next(&h, tc.o, 0)
		assert.Equal(t, tc.again, again, tc)
		assert.Equal(t, tc.again, why == "", tc)
		assert.Equal(t, tc.again, wait >= minBackOff, "a policy of zeros does not spin: %v", tc)
	}
	// Ends for years do not overflow.
	h, r := History{}, Restart{Policy: RestartAlways, BackOff: time.Second, BackOffMax: time.Hour}
	for range 10_000 {
		again, wait, _ := r.Next(&h, bad, 0)
		require.True(t, again)
		require.LessOrEqual(t, wait, time.Hour)
		require.GreaterOrEqual(t, wait, time.Second)
	}
	assert.Equal(t, "ended by signal 9", Outcome{Code: 137, Known: true}.String())
	assert.Equal(t, "its process was killed", killed.String())
	assert.Equal(t, "exit code 3", Outcome{Code: 3, Known: true}.String())
}

// A machine that needs one that failed waits, says so, and starts when a reload has
// brought that one back.
func TestBlocked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := true
		f := newFakes(func(m Machine, _ int) behaviour {
			if m.Name == "db" && broken {
				return behaviour{end: time.Millisecond, ready: -1, outcome: Outcome{Code: 1, Known: true}}
			}
			return behaviour{}
		})
		s := NewSupervisor(f, nil)
		fl := fleetOf(t, "machines: {db: , app: {after: db}, web: {after: app}}")
		reload(t, s, fl, false)
		require.NoError(t, s.WaitReady(t.Context()))
		synctest.Wait()
		assert.Equal(t, "db failed, app waiting, web waiting", states(s))
		assert.Equal(t, "waits for db, which has not become ready and will not", s.Status()[1].Note)
		assert.Equal(t, "db keep, app keep, web keep", reload(t, s, fl, false))
		broken = false
		assert.Equal(t, "db add, app keep, web keep", reload(t, s, fl, true))
		require.NoError(t, s.WaitReady(t.Context()))
		assert.Equal(t, "db running, app running, web running", states(s))
		s.Stop(t.Context())
	})
}

// A command that is done before its machine was seen ready has done its work.
func TestQuickJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakes(func(m Machine, _ int) behaviour {
			if m.Name == "job" {
				return behaviour{ready: -1, end: time.Millisecond, outcome: Outcome{Known: true}}
			}
			return behaviour{}
		})
		s := NewSupervisor(f, nil)
		reload(t, s, fleetOf(t, "machines: {job: , app: {after: job}}"), false)
		require.NoError(t, s.WaitReady(t.Context()))
		assert.Equal(t, "job ended, app running", states(s))
		s.Stop(t.Context())
	})
}

// A reload does what the difference asks for and touches nothing else.
func TestReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakes(nil)
		s := NewSupervisor(f, nil)
		reload(t, s, fleetOf(t, "machines: {a: , b: {vcpus: 1}, c: {shares: 100}, d: , e: {restart: never}}"), false)
		require.NoError(t, s.WaitReady(t.Context()))
		c := f.running["c"]
		f.log = nil
		got := reload(t, s, fleetOf(t, "machines: {a: , b: {vcpus: 2}, c: {shares: 200}, e: {restart: always}, f: {after: [b]}}"), false)
		assert.Equal(t, "d remove, a keep, b replace, c tune, e tune, f add", got)
		require.NoError(t, s.WaitReady(t.Context()))
		assert.ElementsMatch(t, []string{"end b", "end d", "start b", "start f"}, f.log)
		require.Len(t, c.tuned, 1)
		assert.EqualValues(t, 200, c.tuned[0].Shares)
		f.running["e"].finish(Outcome{Known: true})
		time.Sleep(time.Minute)
		assert.Equal(t, "a running, b running, c running, e running, f running", states(s))
		assert.Equal(t, 2, f.starts["e"], "the new policy holds for the machine that was kept")
		s.Stop(t.Context())
		assert.Empty(t, f.running)
	})
}

// The end of the context makes a stop insist; a machine that is not asked for long
// ends at once.
func TestStopInsists(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakes(func(m Machine, _ int) behaviour {
			if m.Name == "stuck" {
				return behaviour{stopFail: errors.New("it does not end")}
			}
			return behaviour{deaf: true, ready: -1}
		})
		s := NewSupervisor(f, nil)
		reload(t, s, fleetOf(t, "machines: {a: {stop-timeout: 1h}, b: {after: a}, stuck: }"), false)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		begin := time.Now()
		s.Stop(ctx)
		assert.Equal(t, 5*time.Second, time.Since(begin))
		assert.Equal(t, "a stopped, b stopped, stuck stopped", states(s))
		assert.Equal(t, "it does not end", s.Status()[2].Last.Err)
	})
}

// Whatever happens to the machines and the file, at the end all of it is stopped.
func TestSupervisorAtRandom(t *testing.T) {
	for seed := range uint64(30) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			var mu sync.Mutex
			f := newFakes(func(Machine, int) behaviour {
				mu.Lock()
				defer mu.Unlock()
				b := behaviour{ready: time.Duration(r.IntN(5000)+1) * time.Millisecond, outcome: Outcome{Known: r.IntN(2) == 0, Code: r.IntN(2)}, deaf: r.IntN(4) == 0}
				if r.IntN(2) == 0 {
					b.end = time.Duration(r.IntN(20000)+1) * time.Millisecond
				}
				if r.IntN(5) == 0 {
					b.fail = errors.New("bad luck")
				}
				return b
			})
			s := NewSupervisor(f, func(Event) {})
			for range 20 {
				text := "machines:\n"
				mu.Lock()
				for i := range r.IntN(8) + 1 {
					text += fmt.Sprintf("  m%d: {vcpus: %d, shares: %d, restart: %s", i, r.IntN(2)+1, r.IntN(2)+1, []string{"always", "never", "on-failure"}[r.IntN(3)])
					if i > 0 && r.IntN(2) == 0 {
						text += fmt.Sprintf(", after: m%d", r.IntN(i))
					}
					text += "}\n"
				}
				revive, wait := r.IntN(2) == 0, time.Duration(r.IntN(10000))*time.Millisecond
				mu.Unlock()
				fl := fleetOf(t, text)
				_, err := s.Reload(t.Context(), fl, revive)
				require.NoError(t, err)
				require.Len(t, s.Status(), len(fl.Machines))
				time.Sleep(wait)
			}
			s.Stop(t.Context())
			require.NoError(t, s.Wait(t.Context()))
			f.mu.Lock()
			assert.Empty(t, f.running, "seed %d", seed)
			f.mu.Unlock()
		})
	}
}

func TestDiffIsEmptyForTheSame(t *testing.T) {
	f := fleetOf(t, whole)
	for _, c := range Diff(f, fleetOf(t, whole)) {
		assert.Equal(t, Keep, c.Action, c)
	}
	assert.Equal(t, "db: add, new", Diff(nil, f)[0].String())
	assert.Equal(t, "shop: keep", Change{"shop", Keep, ""}.String())
	assert.Nil(t, f.Machine("nobody"))
}
