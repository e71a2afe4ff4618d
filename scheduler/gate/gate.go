package gate

import (
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Seat is a vCPU's place at the gate. Its methods but Interrupt belong to the vCPU's
// thread. It is the same type as vmm.Seat, as an alias of the same literal: neither
// package imports the other.
type Seat = interface {
	// Turn tells whether the vCPU may enter the guest; it is asked before
	// every KVM_RUN.
	Turn() bool
	// Wait returns when the vCPU has its turn, or was interrupted.
	Wait()
	// Interrupt makes Wait return, the present or the next. Any goroutine may
	// call it.
	Interrupt()
	// Rest gives the turn up: the vCPU wants none for now.
	Rest()
	// Leave is Rest for good. Nothing is kicked once it has returned.
	Leave()
}

// Config of a gate.
type Config struct {
	// Policy is its name: see Policies. "" is "activity".
	Policy string
	// Processors are the host's processors that the vCPUs share, and to which
	// their threads are bound; nil: all, and no thread is bound.
	Processors []int
	// Slots is how many vCPUs run at once; 0: as many as Processors, or as the
	// host has.
	Slots int
	// Poll is the time between two looks at who has halted and who has woken
	// up, while vCPUs wait for each other; up to four times as long while looks
	// find nothing new. Default 1 ms.
	Poll time.Duration
}

// Gate lets vCPUs into their guests by turns. A vCPU that halts in the kernel gives
// its turn up by the next look, and one that wakes up there runs at once, beside
// the others, until the next look; the policy's boost lets it run before them where
// the kernel may be asked for that. The nil Gate lets everyone in. All methods are
// safe for concurrent use.
type Gate struct {
	cfg    Config
	policy Policy
	boost  func(*Task) bool
	start  time.Time
	event  int // an eventfd: something has changed
	done   chan struct{}
	asleep func(*seat) bool // (*seat).sleeps, but in tests

	mu     lock
	closed bool
	queue  *Queue
	seats  []*seat
	params map[string]Params
	idle   time.Duration // present poll interval when nobody waits
	calm   int           // looks in a row that found nothing new
	looked time.Duration
	cost   time.Duration // of a look, on average
	// relaxed: the watch sleeps for longer than it may when vCPUs wait.
	relaxed bool
	notes   []string
	woken   [8]*seat // to be woken when the lock is free
	wakes   int
	rt      bool // SCHED_RR is permitted
	nice    bool // negative nice values are
}

// New makes a gate; nil for the policy Linux. The error matches ErrPolicy.
func New(cfg Config) (*Gate, error) {
	if cfg.Policy == "" {
		cfg.Policy = "activity"
	}
	p, err := NewPolicy(cfg.Policy)
	if err != nil || p == nil {
		return nil, err
	}
	if cfg.Slots <= 0 {
		if cfg.Slots = len(cfg.Processors); cfg.Slots == 0 {
			cfg.Slots = runtime.NumCPU()
		}
	}
	if cfg.Poll <= 0 {
		cfg.Poll = time.Millisecond
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("gate: eventfd: %w", err)
	}
	g := &Gate{
		cfg: cfg, policy: p, queue: NewQueue(p, cfg.Slots), start: time.Now(), event: fd, done: make(chan struct{}), params: map[string]Params{},
		boost: func(*Task) bool { return false }, asleep: (*seat).sleeps,
	}
	if b, ok := p.(Booster); ok {
		g.boost = b.Boost
	}
	ready := make(chan struct{})
	go g.watch(ready)
	<-ready
	return g, nil
}

// Policy is the policy's name.
func (g *Gate) Policy() string {
	if g == nil {
		return Linux
	}
	return g.cfg.Policy
}

// Notes are what this host does not permit, and what that means.
func (g *Gate) Notes() []string {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.unlock()
	return slices.Clone(g.notes)
}

// Close lets everyone run as the kernel likes and ends the gate.
func (g *Gate) Close() error {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	if !g.closed {
		g.closed = true
		for _, s := range g.seats {
			s.unboost()
			s.turn.Store(true)
			s.wake()
		}
		g.poke()
	}
	g.unlock()
	<-g.done
	return nil
}

// Set changes the parameters of all vCPUs of a machine, present and to come.
func (g *Gate) Set(machine string, p Params) {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.unlock()
	g.params[machine] = p
	now := g.now()
	for _, s := range g.seats {
		if s.task.Name == machine {
			g.queue.Account(now, &s.task)
			s.task.Params = p
		}
	}
	g.queue.Tick(now)
	g.deliver()
}

// Stats are what each vCPU has had, in the order in which they came.
func (g *Gate) Stats() []Stats {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.unlock()
	now := g.now()
	out := make([]Stats, 0, len(g.seats))
	for _, s := range g.seats {
		g.queue.Account(now, &s.task)
		out = append(out, s.task.Stats())
	}
	return out
}

// Join gives a vCPU its seat. It is called on the vCPU's thread, which stays its own;
// kick makes the vCPU leave the guest, and may be called until Leave has returned.
func (g *Gate) Join(machine string, kick func()) (Seat, error) {
	if g == nil {
		return nil, nil
	}
	s := &seat{g: g, kick: kick, tid: unix.Gettid(), stat: -1, parked: true}
	s.task.Name, s.task.Owner = machine, s
	if len(g.cfg.Processors) > 0 {
		var set unix.CPUSet
		for _, p := range g.cfg.Processors {
			set.Set(p)
		}
		if err := unix.SchedSetaffinity(s.tid, &set); err != nil {
			return nil, fmt.Errorf("gate: the vCPU's thread cannot be bound to the processors %v: %w", g.cfg.Processors, err)
		}
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/task/%d/stat", s.tid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("gate: state of the vCPU's thread: %w", err)
	}
	s.stat = fd
	g.mu.Lock()
	defer g.unlock()
	s.task.Params = g.params[machine]
	g.seats = append(g.seats, s)
	return s, nil
}

// unlock frees the lock and then wakes those who would only have waited for it.
func (g *Gate) unlock() {
	woken, n := g.woken, g.wakes
	g.wakes = 0
	g.mu.Unlock()
	for _, s := range woken[:n] {
		futexWake(&s.word)
	}
}

// now is the time since the gate was made.
func (g *Gate) now() time.Duration { return time.Since(g.start) }

// deliver tells threads what the queue has decided, and the watch that there is
// something to look at. Gate.mu is held.
func (g *Gate) deliver() {
	g.tell()
	if g.relaxed && (g.queue.Waiting() > 0 || g.queue.Busy() == g.cfg.Slots && len(g.seats) > g.cfg.Slots) {
		g.relaxed = false
		g.poke()
	}
}

// tell tells threads what the queue has decided.
func (g *Gate) tell() {
	for _, t := range g.queue.Started() {
		s := t.Owner.(*seat)
		s.begun, s.last = s.cpu(), 0
		s.turn.Store(true)
		s.wake()
	}
	for _, t := range g.queue.Kicks() {
		t.Owner.(*seat).out()
	}
}

// poke makes the watch look at once.
func (g *Gate) poke() { _, _ = unix.Write(g.event, []byte{1, 0, 0, 0, 0, 0, 0, 0}) }

// seat is a vCPU's.
type seat struct {
	g    *Gate
	kick func()
	tid  int
	stat int // descriptor of /proc/self/task/TID/stat
	turn atomic.Bool
	word atomic.Uint32 // futex: 1 when there is something to look at

	// Guarded by Gate.mu.
	task        Task
	parked      bool // its thread is not in the guest, and wants nothing
	waits       bool // its thread is in Wait
	interrupted bool
	boosted     bool
	begun       time.Duration // the thread's processor time at the start of its turn
	last        time.Duration // at the last look; 0: there was none
	over        time.Duration // ran without a slot in the present burst
}

// Turn implements Seat.
func (s *seat) Turn() bool { return s.turn.Load() }

// Wait implements Seat.
func (s *seat) Wait() {
	g := s.g
	g.mu.Lock()
	defer g.unlock()
	now := g.now()
	s.parked = false
	switch s.task.State {
	case Blocked:
		g.queue.Wake(now, &s.task)
	case Running:
		if !s.turn.Load() {
			g.queue.Yield(now, &s.task)
		}
	}
	s.waits = true
	s.unboost()
	g.deliver()
	for s.task.State != Running && !s.interrupted && !g.closed {
		s.word.Store(0)
		g.unlock()
		futexWait(&s.word, 0)
		g.mu.Lock()
	}
	s.waits, s.interrupted = false, false
}

// Interrupt implements Seat.
func (s *seat) Interrupt() {
	s.g.mu.Lock()
	defer s.g.unlock()
	s.interrupted = true
	s.wake()
}

// Rest implements Seat.
func (s *seat) Rest() {
	g := s.g
	g.mu.Lock()
	defer g.unlock()
	s.parked, s.interrupted = true, false
	if !g.closed {
		s.turn.Store(false)
	}
	s.unboost()
	g.queue.Block(g.now(), &s.task)
	g.deliver()
}

// Leave implements Seat.
func (s *seat) Leave() {
	s.Rest()
	g := s.g
	g.mu.Lock()
	defer g.unlock()
	if i := slices.Index(g.seats, s); i >= 0 {
		g.seats = slices.Delete(g.seats, i, i+1)
		unix.Close(s.stat)
	}
}

// wake lets the thread look, if it waits.
func (s *seat) wake() {
	s.word.Store(1)
	g := s.g
	if !s.waits {
		return // it looks before it sleeps
	}
	if g.wakes == len(g.woken) {
		futexWake(&s.word)
		return
	}
	g.woken[g.wakes] = s
	g.wakes++
}

// out makes the thread leave the guest and come to Wait.
func (s *seat) out() {
	if s.g.closed {
		return
	}
	s.turn.Store(false)
	s.kick()
}

// cpu is the processor time of the vCPU's thread (clock_getcpuclockid(3): the clocks
// of threads are made of their numbers).
func (s *seat) cpu() time.Duration {
	var ts unix.Timespec
	const perThread, scheduled = 4, 2
	if err := unix.ClockGettime(int32(^s.tid<<3|perThread|scheduled), &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// sleeps tells whether the thread neither runs nor could: it is blocked in the kernel.
func (s *seat) sleeps() bool {
	var b [128]byte
	n, err := unix.Pread(s.stat, b[:], 0)
	if err != nil {
		return false
	}
	// "TID (name) S …", and the name may have any bytes.
	for i := n - 1; i > 1; i-- {
		if b[i-1] == ' ' && b[i-2] == ')' {
			return b[i] != 'R'
		}
	}
	return false
}

// watch looks at the vCPUs on a thread of its own while they wait for each other.
func (g *Gate) watch(ready chan<- struct{}) {
	runtime.LockOSThread() // and never unlocked: it may have a priority of its own
	defer close(g.done)
	g.mu.Lock()
	g.permissions()
	g.unlock()
	close(ready)
	for {
		g.mu.Lock()
		if g.closed {
			g.unlock()
			unix.Close(g.event)
			return
		}
		wait, forever := g.look()
		g.unlock()
		g.sleep(wait, forever)
	}
}

// sleep waits for a poke, or for d.
func (g *Gate) sleep(d time.Duration, forever bool) {
	fds := []unix.PollFd{{Fd: int32(g.event), Events: unix.POLLIN}}
	var ts *unix.Timespec
	if !forever {
		t := unix.NsecToTimespec(int64(max(d, 50*time.Microsecond)))
		ts = &t
	}
	if n, err := unix.Ppoll(fds, ts, nil); err == nil && n > 0 {
		var b [8]byte
		_, _ = unix.Read(g.event, b[:])
	}
}

// idlePoll is the longest poll interval when there is a slot for everyone who runs.
const idlePoll = 50 * time.Millisecond

// look finds out who has halted and who has woken up, ends slices, and returns how
// long nobody needs to look again. Gate.mu is held.
func (g *Gate) look() (wait time.Duration, forever bool) {
	now := g.now()
	poll := g.poll()
	if now-g.looked >= poll*3/4 {
		if g.inspect(now, now-g.looked) {
			g.calm = 0
		} else {
			g.calm++
		}
		g.looked = now
		g.cost += (g.now() - now - g.cost) / 8
	}
	g.queue.Tick(now)
	g.tell()
	inside := 0
	for _, s := range g.seats {
		if !s.parked {
			inside++
		}
	}
	switch {
	case inside <= g.cfg.Slots:
		g.relaxed = true
		return 0, true // there is room for all, whatever they do
	case g.queue.Waiting() > 0 || g.queue.Busy() == g.cfg.Slots:
		g.idle, g.relaxed = poll, false
		// Each look takes the processor from a guest, and what has run for long
		// will go on.
		wait = max(poll, min(poll<<min(g.calm/2, 2), longestPoll))
		if at, ok := g.queue.Next(now); ok {
			wait = min(wait, at-now)
		}
		return wait, false
	}
	g.idle, g.relaxed = min(max(2*g.idle, poll), idlePoll), true
	return g.idle, false
}

const (
	// watchShare is the part of a processor that looking may take, as long as
	// there is a look every longestPoll.
	watchShare  = 0.05
	longestPoll = 10 * time.Millisecond
)

// poll is the time between two looks: longer where a look takes long.
func (g *Gate) poll() time.Duration {
	return max(g.cfg.Poll, min(time.Duration(float64(g.cost)/watchShare), longestPoll))
}

// inspect looks at every thread that is in its guest, and tells whether that changed
// anything: what runs in a moment by a boost does not.
func (g *Gate) inspect(now, elapsed time.Duration) (changed bool) {
	for _, s := range g.seats {
		if s.parked || s.waits || s.task.State == Waiting {
			continue
		}
		cpu := s.cpu()
		ran := cpu - s.last
		if s.last == 0 {
			ran = elapsed // not known: it may have run
		}
		s.last = cpu
		t := &s.task
		switch t.State {
		case Running:
			if ran < elapsed/2 && g.asleep(s) {
				g.queue.Account(now, t)
				turn := t.turn
				g.queue.Refund(now, t, turn-(cpu-s.begun))
				t.burst = lone(t.burst, turn)
				t.Burst = min(t.Burst, max(t.burst, t.Burst*3/4))
				g.queue.Block(now, t)
				s.over = 0
				s.turn.Store(false)
				s.boostIfDue(now)
				changed = true
			}
		case Blocked:
			// One that did not run sleeps, or will be seen next time.
			asleep := ran < elapsed/2
			if ran > 0 && (s.boosted || asleep) {
				// It woke up and ran without asking anybody.
				woke := s.over == 0
				s.over += ran
				g.queue.Charge(t, ran, lone(s.over, elapsed), woke)
			}
			if asleep {
				s.over = 0
				s.boostIfDue(now)
				continue
			}
			if s.boosted && s.over <= 2*shortBurst && g.boost(t) && g.queue.Ahead(now, t) <= credit {
				continue // it will be done in a moment
			}
			s.unboost()
			g.queue.Wake(now, t)
			changed = true
			if t.State != Running {
				s.out()
			}
		}
	}
	return changed
}

// lone is about how long one of the bursts was that a thread has run for, together,
// in a span of time. One that ran for a small part of a long span woke up more often
// than it was looked at, and there is nothing cheap that tells how often.
func lone(ran, span time.Duration) time.Duration {
	const usual = 4 * time.Millisecond
	if span <= usual || ran > span*3/10 {
		return ran
	}
	return time.Duration(float64(ran) * float64(usual) / float64(span))
}

// boostIfDue asks the kernel to let a halted vCPU run as soon as it wakes up, if the
// policy wants that, or takes that back.
func (s *seat) boostIfDue(now time.Duration) {
	due := s.g.boost(&s.task) && s.g.queue.Ahead(now, &s.task) <= credit/2
	switch {
	case due && !s.boosted:
		switch {
		case s.g.rt:
			s.boosted = setRealtime(s.tid, 1) == nil
		case s.g.nice:
			s.boosted = unix.Setpriority(unix.PRIO_PROCESS, s.tid, boostNice) == nil
		}
		if s.boosted && !s.g.closed {
			// A pass: what it does when it wakes up needs no slot, nor do the
			// exits that it makes meanwhile, or each would take the place of
			// one that computes. The next looks tell whether it was a moment.
			s.turn.Store(true)
		}
	case !due:
		s.unboost()
	}
}

const boostNice = -15

// unboost takes the boost back, and the pass that came with it.
func (s *seat) unboost() {
	if !s.boosted {
		return
	}
	s.boosted = false
	if s.task.State != Running && !s.g.closed {
		s.turn.Store(false)
	}
	if s.g.rt {
		_ = setNormal(s.tid) // it was normal before
	} else {
		_ = unix.Setpriority(unix.PRIO_PROCESS, s.tid, 0)
	}
}

// permissions finds out what the kernel lets the gate do, and gives the watch's own
// thread what it can get.
func (g *Gate) permissions() {
	self := unix.Gettid()
	err := setRealtime(self, 2)
	if err == nil {
		g.rt = true
		return
	}
	g.notes = append(g.notes, fmt.Sprintf("SCHED_RR is not permitted (%v): vCPUs that wake up go first by their nice value; give CAP_SYS_NICE for more", err))
	if err := unix.Setpriority(unix.PRIO_PROCESS, self, boostNice); err == nil {
		g.nice = true
		return
	}
	g.notes = append(g.notes, fmt.Sprintf("negative nice values are not permitted: a vCPU that wakes up shares its processor with the others for up to %v", g.cfg.Poll))
}

var _ io.Closer = (*Gate)(nil)
