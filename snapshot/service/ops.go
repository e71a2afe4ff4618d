package service

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/auth"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// Names of the operations.
const (
	OpPing     = ports.OpPing
	OpHostInfo = ports.OpHostInfo
	OpList     = ports.OpList
	OpMark     = ports.OpMark
)

// What the operations take and give is package ports', which guests use as well.
type (
	HostInfoResult = ports.HostInfo
	State          = ports.State
	ListResult     = ports.ListResult
	MarkRequest    = ports.MarkRequest
	MarkResult     = ports.MarkResult
)

// Op performs an operation. The result goes to the guest with the Done event, as
// CBOR; nil is none. Of errors the guest is told *proto.RemoteError only, of others
// that there was one. Operations are performed one at a time; ctx ends when the
// service is closed.
type Op func(ctx context.Context, c *Call) (result any, err error)

// Call is a request that is being performed. Its credentials were right, where
// they were needed.
type Call struct {
	ports.Request

	s        *Service
	who      auth.Principal
	verified bool
}

// May tells whether whoever asked may have another operation performed with this
// one (S5.6); the error is the guest's.
func (c *Call) May(op string) error {
	if c.s == nil || c.s.op(op) == nil {
		return errUnknownOp
	}
	if !slices.Contains(c.s.cfg.Anonymous, op) && !(c.verified && c.who.May(op)) {
		return errNoRight
	}
	return nil
}

// Also performs another operation with this one, if May allows it.
func (c *Call) Also(ctx context.Context, op string, args proto.RawMessage) (any, error) {
	if err := c.May(op); err != nil {
		return nil, err
	}
	other := *c
	other.Op, other.Args = op, args
	return c.s.op(op)(ctx, &other)
}

// PartialError is what an operation fails with that was done, but not all that was
// asked for with it: the event is Done, with the error's code and message.
type PartialError struct{ Err error }

func (e *PartialError) Error() string { return e.Err.Error() }
func (e *PartialError) Unwrap() error { return e.Err }

// Arguments decodes the request's arguments into v, which it leaves alone if there
// are none.
func (c *Call) Arguments(v any) error {
	if len(c.Args) == 0 {
		return nil
	}
	if err := proto.Unmarshal(c.Args, v); err != nil {
		return &proto.RemoteError{Code: proto.CodeBadRequest, Message: "arguments not understood: " + err.Error()}
	}
	return nil
}

func ping(context.Context, *Call) (any, error) { return nil, nil }

// HostInfo is the operation host-info; dir is where the machine's states are, or
// will be: a directory that does not exist yet is made where its parent is.
func HostInfo(dir string) Op {
	return func(context.Context, *Call) (any, error) {
		var fs unix.Statfs_t
		at := dir
		err := unix.Statfs(at, &fs)
		for errors.Is(err, unix.ENOENT) && at != filepath.Dir(at) {
			at = filepath.Dir(at)
			err = unix.Statfs(at, &fs)
		}
		if err != nil {
			return nil, fmt.Errorf("statfs %s: %w", at, err)
		}
		unit := uint64(fs.Frsize)
		r := HostInfoResult{DiskFree: fs.Bavail * unit, DiskTotal: fs.Blocks * unit, CPUs: runtime.NumCPU()}
		f, err := os.Open("/proc/meminfo")
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if r.MemTotal, r.MemFree, err = parseMeminfo(f); err != nil {
			return nil, err
		}
		b, err := os.ReadFile("/proc/loadavg")
		if err != nil {
			return nil, err
		}
		if _, err := fmt.Sscan(string(b), &r.Load[0], &r.Load[1], &r.Load[2]); err != nil {
			return nil, fmt.Errorf("/proc/loadavg: %w", err)
		}
		return r, nil
	}
}

// parseMeminfo finds total and available memory in bytes.
func parseMeminfo(r io.Reader) (total, available uint64, err error) {
	s := bufio.NewScanner(r)
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) < 2 || f[0] != "MemTotal:" && f[0] != "MemAvailable:" {
			continue
		}
		kib, err := strconv.ParseUint(f[1], 10, 54)
		if err != nil {
			return 0, 0, fmt.Errorf("/proc/meminfo: %w", err)
		}
		if f[0] == "MemTotal:" {
			total = kib << 10
		} else {
			available = kib << 10
		}
	}
	return total, available, s.Err()
}

// Lister knows the machine's saved states, and no other machine's (S5.7).
type Lister interface {
	List(ctx context.Context) ([]State, error)
}

// List is the operation list; nil is a machine without states.
func List(l Lister) Op {
	return func(ctx context.Context, _ *Call) (any, error) {
		r := ListResult{States: []State{}}
		if l == nil {
			return r, nil
		}
		states, err := l.List(ctx)
		if err != nil {
			return nil, err
		}
		r.States = append(r.States, states...)
		return r, nil
	}
}

// Mark says that the machine is time-critical for a while (S2.3), or no more.
type Mark struct {
	For       time.Duration // 0: no more
	Principal string
	Why       string // the guest's words, for people
}

// Marker takes marks, and decides for how long they count.
type Marker interface {
	Mark(ctx context.Context, m Mark) (granted time.Duration, err error)
}

// maxMark bounds what is asked for before a Marker sees it.
const maxMark = 24 * time.Hour

// MarkOp is the operation mark.
func MarkOp(m Marker) Op {
	return func(ctx context.Context, c *Call) (any, error) {
		var r MarkRequest
		if err := c.Arguments(&r); err != nil {
			return nil, err
		}
		d := time.Duration(min(r.Millis, uint64(maxMark/time.Millisecond))) * time.Millisecond
		granted, err := m.Mark(ctx, Mark{For: d, Principal: c.Principal, Why: r.Why})
		if err != nil {
			return nil, err
		}
		return MarkResult{Millis: uint64(granted / time.Millisecond)}, nil
	}
}

// Marks is a Marker that records the latest mark. A mark counts for at most Limit
// at a time, and within each Limit*10 for no more than Limit in all, so that a
// guest cannot be time-critical for ever.
type Marks struct {
	Limit time.Duration // default 10 s

	mu     sync.Mutex
	latest Mark
	until  time.Time
	window time.Time // when the present account began
	used   time.Duration
}

// Mark implements Marker. A mark of 0 ends the present one and gives back what is
// left of it.
func (m *Marks) Mark(_ context.Context, mark Mark) (time.Duration, error) {
	limit := m.Limit
	if limit == 0 {
		limit = 10 * time.Second
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	m.used -= max(0, min(m.used, m.until.Sub(now)))
	if now.Sub(m.window) >= 10*limit {
		m.window, m.used = now, 0
	}
	granted := max(0, min(mark.For, limit-m.used))
	m.used += granted
	m.latest, m.until = mark, now.Add(granted)
	return granted, nil
}

// Latest is the latest mark and when it ends or ended.
func (m *Marks) Latest() (Mark, time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.latest, m.until
}
