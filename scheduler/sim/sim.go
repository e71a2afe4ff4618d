package sim

import (
	"container/heap"
	"context"
	"fmt"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gondola-vmm/gondola/scheduler"
	"github.com/gondola-vmm/gondola/scheduler/gate"
	"github.com/gondola-vmm/gondola/scheduler/rules"
)

// Config of a simulation.
type Config struct {
	// Policy is one of gate.Policies. For "linux" the run queue is gate's model
	// of the kernel's fair class; with "activity" the scheduler moves resources
	// beside.
	Policy string
	Hosts  int // machines are dealt out to them in turn
	// Host is the capacity of each; processors are whole.
	Host scheduler.Amounts
	// Step is the time between two decisions of the scheduler; default 1 s.
	Step time.Duration
	// Orders is the time between two cycles of work orders for processor time
	// (S4.7); 0: there are none.
	Orders time.Duration
	// Progress, if set, is told the part that is done, 0 to 1, from several
	// goroutines.
	Progress func(float64)
}

// Result is what came of a policy.
type Result struct {
	Policy   string        `json:"policy"`
	Machines int           `json:"machines"`
	Hosts    int           `json:"hosts"`
	Length   time.Duration `json:"length_ns"`
	Events   uint64        `json:"events"`
	// Utilisation of the processors, 0 to 1, and of each second.
	Utilisation float64   `json:"utilisation"`
	BySecond    []float64 `json:"utilisation_by_second"`
	// Waits is the part of the time in which a vCPU wanted to run that it
	// waited.
	Waits float64 `json:"waits"`
	// Latency from wake-up to running, by kind of machine.
	Latency map[string]Latency `json:"latency"`
	// Work that kinds of machines got done: processor seconds, and bytes.
	Work map[string]scheduler.Amounts `json:"work"`
	// Fairness is Jain's index of what the machines got of the processor time
	// that they wanted; Equals the same among those of one kind on one host,
	// on average.
	Fairness  float64 `json:"fairness"`
	Equals    float64 `json:"fairness_among_equals"`
	Decisions int     `json:"decisions"`
	Moves     int     `json:"moves"`
	Undone    int     `json:"undone"`
	// Work orders made, kept and rolled back, and the changes that they made in the
	// last third of the time.
	Orders           int `json:"orders"`
	OrdersKept       int `json:"orders_kept"`
	OrdersRolledBack int `json:"orders_rolled_back"`
	OrdersLate       int `json:"orders_late"`
}

// Latency of wake-ups.
type Latency struct {
	Count uint64        `json:"count"`
	P50   time.Duration `json:"p50_ns"`
	P99   time.Duration `json:"p99_ns"`
	P999  time.Duration `json:"p999_ns"`
	Worst time.Duration `json:"worst_ns"`
}

// Run simulates. Hosts know nothing of each other and are simulated in parallel.
func Run(ctx context.Context, t *Trace, cfg Config) (*Result, error) {
	if cfg.Hosts < 1 {
		cfg.Hosts = 1
	}
	if cfg.Step <= 0 {
		cfg.Step = time.Second
	}
	if !(cfg.Host[scheduler.CPU] >= 1 && cfg.Host[scheduler.CPU] <= 4096) {
		return nil, fmt.Errorf("a host of %v processors: want 1 to 4096", cfg.Host[scheduler.CPU])
	}
	name := cfg.Policy
	if name == gate.Linux {
		name = "fair"
	}
	if _, err := gate.NewPolicy(name); err != nil {
		return nil, err
	}
	hosts := make([]*host, cfg.Hosts)
	var done atomic.Int64
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, cfg.Hosts)
	for range min(runtime.GOMAXPROCS(0), cfg.Hosts) {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= cfg.Hosts || ctx.Err() != nil {
					return
				}
				p, err := gate.NewPolicy(name)
				if err != nil {
					errs[i] = err
					return
				}
				h := newHost(t, cfg, i, p)
				h.run()
				h.machines = nil // what is left is small
				hosts[i] = h
				if cfg.Progress != nil {
					cfg.Progress(float64(done.Add(1)) / float64(cfg.Hosts))
				}
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	return sum(t, cfg, hosts), nil
}

// machine is a machine on a simulated host.
type machine struct {
	Machine
	spec    scheduler.Spec
	phase   int
	now     Phase
	gone    bool
	tasks   []*task
	free    [2]time.Duration  // when its own rate limits let more through
	limit   scheduler.Amounts // 0: none
	count   scheduler.Sample
	got     scheduler.Amounts
	latency *histogram
	ordered ordered
}

// task is a vCPU.
type task struct {
	gate.Task
	m      *machine
	left   time.Duration // of its burst
	from   time.Duration // since when it runs
	woke   time.Duration
	next   time.Duration // when its schedule wakes it up
	queued bool          // it is in the heap
	began  bool          // it has had a turn since it woke up
	forEve bool          // its burst never ends
}

// event is a task's wake-up, or a machine's next phase.
type event struct {
	at  time.Duration
	seq uint64
	t   *task
	m   *machine
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].seq < e[j].seq
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	old := *e
	x := old[len(old)-1]
	*e = old[:len(old)-1]
	return x
}

// host is a simulated host.
type host struct {
	cfg      Config
	end      time.Duration
	now      time.Duration
	q        *gate.Queue
	slots    []*task // as the queue has them
	kicks    []*gate.Task
	heap     events
	seq      uint64
	machines []*machine
	pipes    [2]time.Duration // network, disk: when they are free
	sched    *scheduler.Scheduler
	obs      []scheduler.Observation
	byName   map[string]*machine
	nextStep time.Duration

	orders    *rules.Orders
	nextOrder time.Duration

	events    uint64
	busy      []float64 // processor seconds by second
	used      float64
	waited    float64
	latency   map[string]*histogram
	work      map[string]scheduler.Amounts
	equals    []float64
	satisfied []float64
	decisions int
	moves     int
	undone    int

	made, kept, rolledBack, late int // work orders
}

const forEver = math.MaxInt64 / 4

func newHost(t *Trace, cfg Config, index int, p gate.Policy) *host {
	h := &host{
		cfg: cfg, end: t.Length, q: gate.NewQueue(p, int(cfg.Host[scheduler.CPU])), slots: make([]*task, int(cfg.Host[scheduler.CPU])),
		latency: map[string]*histogram{}, work: map[string]scheduler.Amounts{}, busy: make([]float64, int(t.Length.Seconds())+1), nextStep: forEver, nextOrder: forEver,
		byName: map[string]*machine{},
	}
	if cfg.Policy == "activity" {
		// The simulation bounds nothing in real time.
		h.sched = scheduler.New(scheduler.Config{Capacity: cfg.Host})
		h.nextStep = cfg.Step
	}
	if cfg.Orders > 0 {
		h.orders, h.nextOrder = rules.NewOrders(orderThresholds), cfg.Orders
	}
	for i := index; i < len(t.Machines); i += cfg.Hosts {
		m := &machine{Machine: t.Machines[i], ordered: ordered{part: usualPart}}
		m.spec = scheduler.Spec{Name: m.Name, Shares: m.Shares, VCPUs: m.VCPUs, Prio: m.Prio, Always: m.Critical}
		l := h.latency[m.Kind]
		if l == nil {
			l = &histogram{}
			h.latency[m.Kind] = l
		}
		m.latency = l
		for range m.VCPUs {
			k := &task{m: m}
			k.Name, k.Owner = m.Name, k
			k.Params = gate.Params{Weight: m.weight(), Order: m.Prio, Critical: m.Critical && cfg.Policy != gate.Linux}
			m.tasks = append(m.tasks, k)
		}
		h.machines = append(h.machines, m)
		h.byName[m.Name] = m
		if len(m.Phases) > 0 {
			h.push(event{at: seconds(m.Phases[0].At), m: m})
		}
	}
	return h
}

func (h *host) push(e event) {
	h.seq++
	e.seq = h.seq
	heap.Push(&h.heap, e)
}

// run is the simulation's loop: what happens next, happens.
func (h *host) run() {
	for {
		at := min(h.nextStep, h.nextOrder)
		if len(h.heap) > 0 {
			at = min(at, h.heap[0].at)
		}
		var done *task
		for _, t := range h.slots {
			if t != nil && !t.forEve {
				if e := t.from + t.left; e < at {
					at, done = e, t
				}
			}
		}
		slice := false
		if n, ok := h.q.Next(h.now); ok && n < at {
			at, done, slice = n, nil, true
		}
		if at >= h.end {
			break
		}
		h.now = max(at, h.now)
		h.events++
		switch {
		case slice:
			h.q.Tick(h.now)
		case done != nil:
			h.finish(done)
		case at == h.nextStep:
			h.step()
			h.nextStep += h.cfg.Step
		case at == h.nextOrder:
			h.order()
			h.nextOrder += h.cfg.Orders
		default:
			e := heap.Pop(&h.heap).(event)
			if e.m != nil {
				h.change(e.m)
			} else {
				e.t.queued = false
				h.wake(e.t)
			}
		}
		h.settle()
	}
	h.now = h.end
	for _, t := range h.slots {
		if t != nil {
			h.stop(t)
		}
	}
	h.finishAll()
}

// settle carries out what the queue decided.
func (h *host) settle() {
	h.kicks = append(h.kicks[:0], h.q.Kicks()...)
	for _, k := range h.kicks {
		if t := k.Owner.(*task); k.Kicked && k.State == gate.Running {
			h.stop(t)
			h.slots[k.Slot] = nil
			h.q.Yield(h.now, k)
		}
	}
	for _, k := range h.q.Started() {
		t := k.Owner.(*task)
		if k.State != gate.Running {
			continue // and was sent out again
		}
		h.slots[k.Slot] = t
		t.from = h.now
		if !t.began {
			t.began = true
			t.m.latency.add(h.now - t.woke)
		}
	}
}

// stop accounts for a task's turn.
func (h *host) stop(t *task) {
	d := h.now - t.from
	if d <= 0 {
		return
	}
	t.left -= d
	t.m.count.Run += uint64(d)
	t.m.got[scheduler.CPU] += d.Seconds()
	h.used += d.Seconds()
	// By second, for the picture.
	for a := t.from; a < h.now; {
		s := int(a / time.Second)
		b := min(time.Duration(s+1)*time.Second, h.now)
		h.busy[min(s, len(h.busy)-1)] += (b - a).Seconds()
		a = b
	}
	t.from = h.now
}

// change begins a machine's next phase.
func (h *host) change(m *machine) {
	m.now = m.Phases[m.phase]
	m.phase++
	if m.phase < len(m.Phases) {
		h.push(event{at: max(seconds(m.Phases[m.phase].At), h.now), m: m})
	}
	m.gone = m.now.Gone
	for _, t := range m.tasks {
		if t.State == gate.Blocked {
			if !t.queued && !m.gone {
				t.next = h.now
				h.wake(t)
			}
			continue
		}
		if m.gone || t.forEve {
			if t.State == gate.Running {
				h.stop(t)
				h.slots[t.Slot] = nil
			}
			h.q.Block(h.now, &t.Task)
			t.forEve = false
			if !m.gone {
				t.next = h.now
				h.wake(t)
			}
		}
	}
}

// burst is how much each vCPU works when it wakes up, and how often that is.
func (p Phase) burst(vcpus int) (work, period time.Duration, forEve bool) {
	part := min(p.CPU/float64(vcpus), 1)
	if part >= 0.98 {
		return forEver, 0, true
	}
	wakes := p.Wakes
	if wakes <= 0 {
		wakes = 10
	}
	// No burst is shorter than a µs, nor longer than a second.
	wakes = min(max(wakes, part), 20000)
	period = seconds(1 / wakes)
	return max(time.Duration(part*float64(period)), time.Microsecond), period, false
}

// wake makes a vCPU want to run.
func (h *host) wake(t *task) {
	m := t.m
	if m.gone || t.State != gate.Blocked {
		return
	}
	if m.now.CPU <= 0 && m.now.Net <= 0 && m.now.Disk <= 0 {
		return // the next phase wakes it
	}
	work, period, forEve := m.now.burst(m.VCPUs)
	t.left, t.forEve, t.began, t.woke = work, forEve, false, h.now
	t.next = max(t.next, h.now-period) + period
	m.count.Wakes++
	h.q.Wake(h.now, &t.Task)
}

// finish ends a burst: the vCPU does its input and output, and sleeps until that is
// done and its time has come.
func (h *host) finish(t *task) {
	h.stop(t)
	h.slots[t.Slot] = nil
	h.q.Block(h.now, &t.Task)
	m := t.m
	_, period, _ := m.now.burst(m.VCPUs)
	at := t.next
	for i, r := range [2]scheduler.Resource{scheduler.Net, scheduler.Disk} {
		n := m.now.Net
		if r == scheduler.Disk {
			n = m.now.Disk
		}
		n = n * period.Seconds() / float64(m.VCPUs)
		if n <= 0 {
			continue
		}
		end := h.now
		if c := h.cfg.Host[r]; c > 0 {
			h.pipes[i] = max(h.pipes[i], h.now) + seconds(n/c)
			end = h.pipes[i]
		}
		if l := m.limit[r]; l > 0 {
			m.free[i] = max(m.free[i], h.now) + seconds(n/l)
			if m.free[i] > end {
				end = m.free[i]
				if r == scheduler.Net {
					m.count.NetHeld++
				} else {
					m.count.DiskHeld++
				}
			}
		}
		if end <= h.end {
			m.got[r] += n
		}
		if r == scheduler.Net {
			m.count.NetBytes += uint64(n)
		} else {
			m.count.DiskBytes += uint64(n)
		}
		at = max(at, end)
	}
	t.queued = true
	h.push(event{at: at, t: t})
}

// origin of simulated time.
var origin = time.Unix(0, 0).UTC()

// step lets the scheduler decide.
func (h *host) step() {
	now := origin.Add(h.now)
	h.obs = h.obs[:0]
	h.observe()
	for _, m := range h.machines {
		if m.phase == 0 || m.gone {
			continue
		}
		h.obs = append(h.obs, scheduler.Observation{Spec: m.spec, Sample: m.count})
	}
	p := h.sched.Step(now, h.obs)
	for _, d := range p.Decisions {
		h.decisions++
		switch d.Kind {
		case scheduler.Moved, scheduler.Traded:
			h.moves++
		case scheduler.RolledBack:
			h.undone++
		}
	}
	for _, a := range p.Allocations {
		m := h.byName[a.Machine]
		m.limit = a.Limit
		for _, t := range m.tasks {
			h.q.Account(h.now, &t.Task)
			t.Params = gate.Params{Weight: max(a.Has[scheduler.CPU]/float64(m.VCPUs), 1e-3), Order: a.Order, Critical: a.Order >= scheduler.OrderCritical, Slice: a.Slice}
		}
	}
	h.q.Tick(h.now)
}
