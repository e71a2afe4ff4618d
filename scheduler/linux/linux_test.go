package linux

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/scheduler"
)

func TestParsers(t *testing.T) {
	run, wait, turns, ok := parseSchedstat("123 45 6\n")
	assert.EqualValues(t, 6, turns)
	assert.True(t, ok)
	assert.EqualValues(t, 123, run)
	assert.EqualValues(t, 45, wait)
	stat := "7 (a) b ( ) S 1 7 7 0 -1 4194304 1 2 3 4 100 20 0 0 20 0 1 0 5555 " + strings.Repeat("0 ", 20) + "60 0\n"
	user, sys, guest, ok := parseStat(stat)
	require.True(t, ok)
	assert.Equal(t, []uint64{100, 20, 60}, []uint64{user, sys, guest})
	start, ok := startTime(stat)
	assert.True(t, ok)
	assert.EqualValues(t, 5555, start)
	p, ok := parsePressure("some avg10=12.50 avg60=0.00 avg300=0.00 total=5\nfull avg10=1.00 avg60=0 avg300=0 total=1\n")
	assert.True(t, ok)
	assert.InDelta(t, 0.125, p, 1e-9)
}

// The machine's own weight, and the narrowest quota on the way to the root.
func TestCPUGroup(t *testing.T) {
	dir := t.TempDir()
	p := Proc{Root: filepath.Join(dir, "proc"), Groups: filepath.Join(dir, "cgroup")}
	write := func(file, text string) {
		t.Helper()
		file = filepath.Join(dir, file)
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, []byte(text), 0o644))
	}
	check := func(weight int64, quota float64) {
		t.Helper()
		w, q := p.CPUGroup(7)
		assert.Equal(t, weight, w)
		assert.InDelta(t, quota, q, 1e-9)
	}
	check(0, 0) // no such process
	write("proc/7/cgroup", "1:cpu:/old\n")
	check(0, 0)
	write("proc/7/cgroup", "0::/gondola/web\n")
	check(0, 0) // no cpu controller
	write("cgroup/gondola/web/cpu.weight", "250\n")
	write("cgroup/gondola/web/cpu.max", "max 100000\n")
	check(250, 0)
	write("cgroup/gondola/cpu.max", "150000 100000\n")
	check(250, 1.5)
	write("cgroup/gondola/web/cpu.max", "50000 100000\n")
	check(250, 0.5)
	write("cgroup/gondola/web/cpu.max", "200000 100000\n")
	check(250, 1.5)
	for _, odd := range []string{"", "x y", "-1 100000", "100000 0", "1 2 3"} {
		write("cgroup/gondola/web/cpu.max", odd)
		check(250, 1.5)
	}
	write("cgroup/gondola/web/cpu.weight", "1000000")
	check(0, 1.5)
	write("proc/7/cgroup", "0::/../../etc\n") // outside of this namespace
	check(0, 0)
}

func FuzzParsers(f *testing.F) {
	for _, s := range []string{"1 2 3", "7 (x) S 1 2", "some avg10=NaN", "0-3,9", "5-1", "0-99999999"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		parseSchedstat(s)
		parseStat(s)
		startTime(s)
		if p, ok := parsePressure(s); ok {
			require.True(t, p >= 0 && p <= 1)
		}
		if n, ok := parseMax(s); ok {
			require.True(t, n > 0)
		}
		if l, err := ParseList(s); err == nil {
			back, err := ParseList(FormatList(l))
			require.NoError(t, err)
			require.Equal(t, l, back)
		}
	})
}

// The times of this very process are read, by threads or all together.
func TestProc(t *testing.T) {
	for i, x := 0, 0; i < 50_000_000; i++ {
		x += i
	}
	for _, p := range []Process{{PID: os.Getpid()}, {PID: os.Getpid(), Threads: []int{os.Getpid(), 1 << 30}}} {
		var s scheduler.Sample
		require.NoError(t, Proc{}.Read(p, &s))
		assert.Positive(t, s.Run)
	}
	var s scheduler.Sample
	assert.ErrorIs(t, Proc{}.Read(Process{PID: os.Getpid(), Threads: []int{1 << 30}}, &s), os.ErrNotExist)
	assert.Error(t, Proc{}.Read(Process{PID: 1 << 30}, &s))
}

func TestLists(t *testing.T) {
	l, err := ParseList("0-3,8,2")
	require.NoError(t, err)
	assert.Equal(t, []int{0, 1, 2, 3, 8}, l)
	assert.Equal(t, "0-3,8", FormatList(l))
	for _, bad := range []string{"x", "3-1", "-1", "1,,2", "0-99999999"} {
		_, err := ParseList(bad)
		assert.Error(t, err, bad)
	}
}

func TestTopology(t *testing.T) {
	sys := t.TempDir()
	write := func(cpu, file, v string) {
		p := filepath.Join(sys, "devices/system/cpu", cpu, file)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, []byte(v+"\n"), 0o644))
	}
	write("cpu0", "topology/thread_siblings_list", "0,2")
	write("cpu2", "topology/thread_siblings_list", "0,2")
	write("cpu2", "cache/index3/shared_cpu_list", "2-3")
	require.NoError(t, os.MkdirAll(filepath.Join(sys, "devices/system/cpu/cpu2/node1"), 0o755))
	assert.Equal(t, []scheduler.Processor{{ID: 0, Core: 0}, {ID: 2, Core: 0, L3: 2, Node: 1}, {ID: 9, Core: 9}}, Topology(sys, []int{0, 2, 9}))
}

func TestWeights(t *testing.T) {
	assert.EqualValues(t, 5000, Weight(2, 4))
	assert.EqualValues(t, 1, Weight(0, 4))
	assert.EqualValues(t, 10000, Weight(9, 4))
	assert.EqualValues(t, 1, Weight(1, 0))
	assert.EqualValues(t, 0, Quota(0))
	assert.EqualValues(t, 150_000, Quota(1.5))
	assert.EqualValues(t, 1000, Quota(1e-9))
}

func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	j, err := OpenJournal(path)
	require.NoError(t, err)
	b := Before{Machine: "a", PID: 7, Start: 9, Cgroup: "/x", Group: "/sys/fs/cgroup/gondola/a", Affinity: map[int]string{8: "0-1"}, Limits: map[string]uint64{"vda": 5}}
	require.NoError(t, j.Put(b))
	require.NoError(t, j.Put(Before{Machine: "b", PID: 8}))
	j, err = OpenJournal(path)
	require.NoError(t, err)
	require.Len(t, j.All(), 2)
	got, ok := j.Get("a")
	assert.True(t, ok)
	assert.Equal(t, b, got)
	require.NoError(t, j.Drop("a"))
	require.NoError(t, j.Drop("a"))
	require.NoError(t, j.Drop("b"))
	assert.NoFileExists(t, path, "nothing is left to undo")
	require.NoError(t, os.WriteFile(path, []byte("{"), 0o600))
	_, err = OpenJournal(path)
	assert.ErrorIs(t, err, ErrJournal)
}

// child is a process that does nothing.
func child(t *testing.T) Machine {
	c := exec.Command("sleep", "1000")
	require.NoError(t, c.Start())
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	})
	return Machine{Name: "m", Process: Process{PID: c.Process.Pid, Threads: []int{c.Process.Pid}}}
}

type controls struct {
	limits map[string]uint64
	memory uint64
	err    error
}

func (c *controls) SetLimits(_ string, l map[string]uint64) error { c.limits = l; return c.err }
func (c *controls) SetMemory(_ string, n uint64) error            { c.memory = n; return c.err }

// A scheduler that is killed in the middle leaves what its successor undoes: threads
// are bound as they were, policies are normal, cgroups empty, limits put back.
func TestKilledInTheMiddle(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	j, err := OpenJournal(path)
	require.NoError(t, err)
	var notes []string
	m := child(t)
	var was unix.CPUSet
	require.NoError(t, unix.SchedGetaffinity(m.PID, &was))
	group, err := Proc{}.Cgroup(m.PID)
	require.NoError(t, err)
	allowed, err := Allowed()
	require.NoError(t, err)
	capacity := scheduler.Amounts{scheduler.CPU: 4}
	a := NewActuator(Options{Journal: j, Affinity: true, Realtime: true, Capacity: capacity, Group: "gondola-test", Note: func(s string) { notes = append(notes, s) }})
	al := scheduler.Allocation{Machine: "m", Has: scheduler.Amounts{scheduler.CPU: 1}, Limit: scheduler.Amounts{scheduler.CPU: 0.5}, Order: scheduler.OrderCritical}
	for range 3 {
		require.NoError(t, a.Apply(m, al, allowed[:1]))
	}
	require.NoError(t, a.NoteLimits(m, map[string]uint64{"vda": 77}, 5))
	var now unix.CPUSet
	require.NoError(t, unix.SchedGetaffinity(m.PID, &now))
	assert.Equal(t, 1, now.Count())
	if a.Cgroups() {
		b, err := os.ReadFile("/sys/fs/cgroup/gondola-test/m/cpu.max")
		require.NoError(t, err)
		assert.Equal(t, "50000 100000\n", string(b))
		b, err = os.ReadFile("/sys/fs/cgroup/gondola-test/m/cpu.weight")
		require.NoError(t, err)
		assert.Equal(t, "2500\n", string(b))
		in, err := Proc{}.Cgroup(m.PID)
		require.NoError(t, err)
		assert.Equal(t, "/gondola-test/m", in)
	} else {
		require.NotEmpty(t, notes)
		assert.Contains(t, notes[0], "control groups are not used")
	}
	seen := map[string]bool{}
	for _, n := range notes {
		assert.False(t, seen[n], "told once: %s", n)
		seen[n] = true
	}

	// The next one.
	j, err = OpenJournal(path)
	require.NoError(t, err)
	require.Len(t, j.All(), 1)
	a = NewActuator(Options{Journal: j, NoCgroups: true})
	ctl := &controls{err: errors.New("does not answer")}
	require.Error(t, a.UndoAll(ctl), "what could not be put back stays in the journal")
	require.Len(t, j.All(), 1)
	ctl.err = nil
	require.NoError(t, a.UndoAll(ctl))
	assert.Equal(t, map[string]uint64{"vda": 77}, ctl.limits)
	assert.EqualValues(t, 5, ctl.memory)
	require.NoError(t, unix.SchedGetaffinity(m.PID, &now))
	assert.Equal(t, was, now)
	attr, err := unix.SchedGetAttr(m.PID, 0)
	require.NoError(t, err)
	assert.EqualValues(t, unix.SCHED_NORMAL, attr.Policy)
	in, err := Proc{}.Cgroup(m.PID)
	require.NoError(t, err)
	assert.Equal(t, group, in)
	assert.NoDirExists(t, "/sys/fs/cgroup/gondola-test/m")
	assert.NoFileExists(t, path)
}

// The control group that a machine is in is taken away, with the whole tree, by somebody
// else: the machine goes on, the next step makes them again, and in the end there is
// nothing to put back but what is still there.
func TestTreeTakenAway(t *testing.T) {
	j, err := OpenJournal(filepath.Join(t.TempDir(), "j"))
	require.NoError(t, err)
	m := child(t)
	capacity := scheduler.Amounts{scheduler.CPU: 4}
	a := NewActuator(Options{Journal: j, Capacity: capacity, Group: "gondola-taken"})
	group, err := Proc{}.Cgroup(m.PID)
	give := func(n float64) error {
		return a.Apply(m, scheduler.Allocation{Machine: "m", Has: scheduler.Amounts{scheduler.CPU: n}}, nil)
	}
	require.NoError(t, give(1))
	if a.Cgroups() {
		require.NoError(t, err)
		procs := filepath.Join("/sys/fs/cgroup", group, "cgroup.procs")
		require.NoError(t, os.WriteFile(procs, []byte(strconv.Itoa(m.PID)), 0o600))
		require.NoError(t, os.Remove("/sys/fs/cgroup/gondola-taken/m"))
		require.NoError(t, os.Remove("/sys/fs/cgroup/gondola-taken"))
		if give(2) != nil { // it may have to find out first
			require.NoError(t, give(2))
		}
		b, err := os.ReadFile("/sys/fs/cgroup/gondola-taken/m/cpu.weight")
		require.NoError(t, err)
		assert.Equal(t, "5000\n", string(b))
		require.NoError(t, os.WriteFile(procs, []byte(strconv.Itoa(m.PID)), 0o600))
		require.NoError(t, os.Remove("/sys/fs/cgroup/gondola-taken/m"))
	}
	require.NoError(t, a.UndoAll(&controls{}))
	assert.Empty(t, j.All())
	if err == nil {
		now, err := Proc{}.Cgroup(m.PID)
		require.NoError(t, err)
		assert.Equal(t, group, now)
	}
}

// A number that is another process's by now is left alone.
func TestUndoOfTheDead(t *testing.T) {
	j, err := OpenJournal(filepath.Join(t.TempDir(), "j"))
	require.NoError(t, err)
	m := child(t)
	start, err := Proc{}.Start(m.PID)
	require.NoError(t, err)
	require.NoError(t, j.Put(Before{Machine: "m", PID: m.PID, Start: start + 1, Limits: map[string]uint64{"vda": 1}, Affinity: map[int]string{m.PID: "0"}}))
	ctl := &controls{}
	require.NoError(t, NewActuator(Options{Journal: j, NoCgroups: true}).UndoAll(ctl))
	assert.Nil(t, ctl.limits)
	assert.Empty(t, j.All())
}

// What is gone in the middle is no failure of the others.
func TestApplyToTheDead(t *testing.T) {
	j, err := OpenJournal(filepath.Join(t.TempDir(), "j"))
	require.NoError(t, err)
	a := NewActuator(Options{Journal: j, NoCgroups: true, Affinity: true, Capacity: scheduler.Amounts{scheduler.CPU: 4}})
	err = a.Apply(Machine{Name: "gone", Process: Process{PID: 1 << 30}}, scheduler.Allocation{}, []int{0})
	assert.ErrorIs(t, err, os.ErrNotExist)
	assert.Empty(t, j.All())
}

// BenchmarkMonitor is the cost of reading one machine with two vCPUs.
func BenchmarkMonitor(b *testing.B) {
	p := Process{PID: os.Getpid(), Threads: []int{os.Getpid(), os.Getpid()}}
	b.ReportAllocs()
	for b.Loop() {
		var s scheduler.Sample
		if err := (Proc{}).Read(p, &s); err != nil {
			b.Fatal(err)
		}
	}
}

// The processors of threads together are this process's, and none of one that is none.
func TestAllowedTo(t *testing.T) {
	own, err := Allowed()
	require.NoError(t, err)
	assert.Equal(t, own, AllowedTo([]int{0, 1<<22 + 1}))
	assert.Empty(t, AllowedTo(nil))
}
