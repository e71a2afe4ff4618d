package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"sync"

	"github.com/spf13/pflag"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/layers"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

// Operations of a machine's control socket on its states.
const (
	opStateSave    = "state.save"    // ports.SaveRequest → snapshot.StateResult, with control.Progress in bytes
	opStateRestore = "state.restore" // ports.Name → snapshot.StateResult
	opStateCurrent = "state.current" // no arguments → currentResult
)

// currentResult names the state that a machine was saved to or restored from last.
type currentResult struct {
	Name string `cbor:"1,keyasint,omitempty"`
}

// envStates is where machines' states are, a directory for each.
const envStates = "GONDOLA_STATES"

// statesDir is the directory of a machine's states.
func statesDir(machine string) (string, error) {
	dir := os.Getenv(envStates)
	if dir == "" {
		data := os.Getenv("XDG_DATA_HOME")
		if data == "" {
			home, err := os.UserHomeDir()
			if err != nil {
				return "", fmt.Errorf("there is no place for states: %w; set $%s", err, envStates)
			}
			data = filepath.Join(home, ".local", "share")
		}
		dir = filepath.Join(data, "gondola", "states")
	}
	return filepath.Join(dir, machine), nil
}

// saveBuffer is how much of a save is taken in memory while the machine stands
// still, in bytes; the disk's pace counts only beyond that.
const saveBuffer = 128 << 20

// openStates opens the directory of a machine's states. Unless make is set, it has
// to be there. o has the quotas.
func openStates(machine string, make bool, o store.Options) (*store.Store, error) {
	dir, err := statesDir(machine)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(dir); err != nil && !make {
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("machine %s has no states: gondola state save %s NAME makes one (looked in %s)", machine, machine, dir)
		}
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return nil, err
	}
	o.Buffer = saveBuffer
	return store.Open(dir, o)
}

// keepLayers gives the machine that cfg describes, whose name is settled, a place for
// the layers that its states have of its disks. What a machine of this name left there
// when it was killed is removed.
func keepLayers(ctx context.Context, cfg *guest.Config) error {
	dir, err := statesDir(cfg.Name)
	if err != nil {
		return nil // no states, and temporary layers where temporary files are
	}
	cfg.DiskStates = layers.Dir(dir)
	if _, err := os.Stat(cfg.DiskStates); err != nil {
		return nil // nothing was left
	}
	s, err := openStates(cfg.Name, true, store.Options{})
	if err != nil {
		return err
	}
	return errors.Join(layers.Collect(ctx, s), s.Close())
}

// states are those of the machine that this process runs. The directory is made
// when the first one is saved.
type states struct {
	machine  string
	quota    store.Options
	base     *store.State // that the machine was made from, if it is one of them; set before attach
	attached chan struct{}
	guest    *guest.Guest
	shape    guest.Shape

	mu      sync.Mutex
	closed  bool
	store   *store.Store
	manager *snapshot.Manager
}

func newStates(machine string, quota store.Options) *states {
	return &states{machine: machine, quota: quota, attached: make(chan struct{})}
}

// registerQuota registers the flags of a machine's quotas.
func registerQuota(fl *pflag.FlagSet, o *store.Options) {
	fl.IntVar(&o.MaxStates, "max-states", 0, "states that the machine may have, counting deleted ones that others need (0: any number)")
	fl.Var((*byteSize)(&o.MaxBytes), "max-state-bytes", "disk space that its states may take, with K, M or G (0: any)")
}

// byteSize is a flag's number of bytes.
type byteSize int64

// Set implements pflag.Value.
func (b *byteSize) Set(s string) error {
	var m memorySize
	if err := m.Set(s); err != nil {
		return err
	}
	if m > math.MaxInt64 {
		return errors.New("want less than 8 EiB")
	}
	*b = byteSize(m)
	return nil
}

// String implements pflag.Value.
func (b *byteSize) String() string {
	m := memorySize(*b)
	return m.String()
}

// Type implements pflag.Value.
func (b *byteSize) Type() string { return "size" }

// attach gives it the guest when it runs. It may be called once.
func (s *states) attach(g *guest.Guest, shape guest.Shape) {
	s.guest, s.shape = g, shape
	close(s.attached)
}

// get returns the machine's manager, when the machine runs.
func (s *states) get(ctx context.Context) (*snapshot.Manager, error) {
	select {
	case <-s.attached:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, snapshot.ErrClosed
	}
	if s.manager == nil {
		st, err := openStates(s.machine, true, s.quota)
		if err != nil {
			return nil, err
		}
		s.store = st
		s.manager = snapshot.New(snapshot.Config{
			VM: s.guest.VM(), Store: st, Base: s.base, Restored: s.guest.Renew, Machine: map[string]string{machineShape: s.shape.String()},
			Deleted: func(ctx context.Context) {
				if err := layers.Collect(ctx, st); err != nil { // the next start, or gondola state rm, does it
					fmt.Fprintf(os.Stderr, "gondola: layers of deleted states: %v\n", err)
				}
			},
		})
		s.base = nil // the manager's
	}
	return s.manager, nil
}

// Close waits for saves and restores under way. It is idempotent.
func (s *states) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.base != nil {
		_ = s.base.Close() // it was only read
		s.base = nil
	}
	if s.manager == nil {
		return nil
	}
	err := errors.Join(s.manager.Close(), s.store.Close())
	s.manager = nil
	return err
}

// ops are the operations for the control socket.
func (s *states) ops() map[string]func(*proto.Call) {
	return map[string]func(*proto.Call){
		opStateSave: control.HandleProgress(func(ctx context.Context, a *ports.SaveRequest, report func(control.Progress)) (any, error) {
			m, err := s.get(ctx)
			if err != nil {
				return nil, err
			}
			i, t, err := m.Save(ctx, snapshot.SaveOptions{
				Name: a.Name, Description: a.Description, Tags: a.Tags, Still: a.Still,
				Progress: func(done, total uint64) { report(control.Progress{Done: done, Total: total}) },
			})
			return snapshot.Result(i, t), err
		}),
		opStateRestore: control.Handle(func(ctx context.Context, a *ports.Name) (any, error) {
			m, err := s.get(ctx)
			if err != nil {
				return nil, err
			}
			i, t, err := m.Restore(ctx, a.Name)
			return snapshot.Result(i, t), err
		}),
		opStateCurrent: control.Handle(func(ctx context.Context, _ *struct{}) (any, error) {
			m, err := s.get(ctx)
			if err != nil {
				return nil, err
			}
			return currentResult{m.Current()}, nil
		}),
	}
}
