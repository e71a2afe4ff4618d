package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/kvm"
)

// A start without --cold leaves a state of the machine when its agent is up and at rest in a
// directory of the cache, and uses that of an earlier one (docs/states.md). The
// directory's name is a hash of all that decides what a machine is like then; in it is
// a store with one state.
const (
	warmName = "booted"   // of the state
	warmUsed = "used"     // a file with the time of the last use
	warmGone = ".removed" // begins the name of a directory that is being removed

	// envWarmMax is how many bytes the states may take together.
	envWarmMax     = "GONDOLA_WARM_MAX"
	warmMaxDefault = 2 << 30

	// warmPatience is how long the agent of a machine from the cache may take to
	// answer before the machine is booted instead.
	warmPatience = 30 * time.Second
)

// warmDir is the directory of all.
func warmDir() (string, error) {
	cache, err := initramfs.DefaultCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(cache, "warm"), nil
}

// warmMax is the bound of what is kept.
func warmMax() (int64, error) {
	s := os.Getenv(envWarmMax)
	if s == "" {
		return warmMaxDefault, nil
	}
	var b byteSize
	if err := b.Set(s); err != nil {
		return 0, fmt.Errorf("$%s: %w", envWarmMax, err)
	}
	return int64(b), nil
}

// warmKey is what a machine's state is kept under, and the text that it stands for.
func warmKey(ctx context.Context, cfg guest.Config) (key, text string, err error) {
	var b strings.Builder
	fmt.Fprintf(&b, "gondola: %s\n", buildVersion())
	exe, err := os.Stat("/proc/self/exe")
	if err != nil {
		return "", "", err
	}
	fmt.Fprintf(&b, "program: %d %d", exe.Size(), exe.ModTime().UnixNano())
	if st, ok := exe.Sys().(*syscall.Stat_t); ok {
		fmt.Fprintf(&b, " %d", st.Ino)
	}
	if err := hostText(&b); err != nil {
		return "", "", err
	}
	inputs, err := cfg.Inputs(ctx)
	if err != nil {
		return "", "", err
	}
	b.WriteString(inputs)
	sum := sha256.Sum256([]byte(b.String()))
	return hex.EncodeToString(sum[:16]), b.String(), nil
}

// hostText tells hosts apart whose machines differ. vmm.VM.Prepare looks closer.
func hostText(b *strings.Builder) error {
	kind, err := vmm.Kind()
	if err != nil {
		return err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	fmt.Fprintf(b, "\nhost: %v Linux %s\nprocessor:", kind, unix.ByteSliceToString(u.Release[:]))
	sys, err := kvm.Open()
	if err != nil {
		return err
	}
	defer sys.Close()
	leaves, err := sys.SupportedCPUID()
	if err != nil {
		return err
	}
	for _, l := range leaves {
		switch {
		case l.Function == 1: // EBX has the number of the processor that was asked
			fmt.Fprintf(b, " 1:%x,%x,%x", l.EAX, l.ECX, l.EDX)
		case l.Function == 0, l.Function == 7, l.Function >= 0x80000001 && l.Function <= 0x80000008:
			fmt.Fprintf(b, " %x.%d:%x,%x,%x,%x", l.Function, l.Index, l.EAX, l.EBX, l.ECX, l.EDX)
		}
	}
	b.WriteByte('\n')
	return nil
}

// warm is a start with the cache; nil is one without.
type warm struct {
	dir    string
	text   string
	shape  guest.Shape
	store  *store.Store
	state  *store.State  // to start from; nil: there is none, so this start's is kept
	keyed  time.Duration // that finding the key took
	looked time.Duration // that finding and checking the state took
	free   chan struct{} // closed when the guest is everybody's
	saving sync.WaitGroup
	cancel context.CancelFunc
}

// others is closed when others than who started the machine may do something in its
// guest: what they did before its state is taken would be in each that starts from it.
// nil: at once.
func (w *warm) others() <-chan struct{} {
	if w == nil || w.state != nil || w.store == nil {
		return nil
	}
	return w.free
}

// lookedFor says for people what the search for a kept state took.
func (w *warm) lookedFor() string {
	if w == nil {
		return ""
	}
	found := "none"
	if w.state != nil {
		found = "used"
	}
	return fmt.Sprintf("state after an earlier boot: %s; %s, key %v, state %v", found, filepath.Base(w.dir), w.keyed.Round(time.Millisecond), w.looked.Round(time.Millisecond))
}

// warmable tells whether a machine's start may use the cache: it can be saved, has
// nothing of the host's that others must not have, too, and an agent to tell it that
// it is another copy.
func (f *runFlags) warmable(cfg *guest.Config) bool {
	return !f.cold && cfg.From == nil && cfg.Console == guest.NoConsole && cfg.Initrd == "" && len(cfg.Disks)+cfg.DiskSlots == 0 &&
		cfg.Vsock == nil && (cfg.Net == nil || cfg.Net.Tap == "" && cfg.Net.Private == "")
}

// boot starts the guest, from the cache if it can be.
func (f *runFlags) boot(ctx context.Context, cfg *guest.Config) (*guest.Guest, *warm, error) {
	if _, err := vmm.Kind(); err != nil {
		return nil, nil, err
	}
	var w *warm
	var unkept error
	if f.warmable(cfg) {
		cfg.Copied = true
		if w, unkept = openWarm(ctx, *cfg); unkept != nil && ctx.Err() != nil {
			return nil, nil, unkept
		}
		if w != nil && w.state != nil {
			g, err := w.start(ctx, *cfg)
			if err == nil || ctx.Err() != nil {
				return g, w, err
			}
			w.discard(err)
		}
	}
	g, err := guest.Start(ctx, *cfg)
	if err == nil && unkept != nil { // else the start has said what is wrong with the machine
		fmt.Fprintf(os.Stderr, "gondola: the state after the boot cannot be kept or used: %v\n", unkept)
	}
	return g, w, err
}

// openWarm looks for the state of a machine like cfg's.
func openWarm(ctx context.Context, cfg guest.Config) (*warm, error) {
	parent, err := warmDir()
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	key, text, err := warmKey(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, err
	}
	w := &warm{dir: filepath.Join(parent, key), text: text, shape: cfg.Shape(), free: make(chan struct{}), cancel: func() {}, keyed: time.Since(begin)}
	defer func() { w.looked = time.Since(begin) - w.keyed }()
	if w.store, err = store.Open(w.dir, store.Options{Buffer: saveBuffer}); err != nil {
		return nil, err
	}
	w.state, err = w.store.Get(ctx, warmName)
	if err == nil {
		err = w.store.VerifyOnce(ctx, w.state, nil)
	}
	damaged := errors.Is(err, store.ErrDamaged) || errors.Is(err, store.ErrForeign) || errors.Is(err, store.ErrVersion)
	switch {
	case err == nil:
		now := time.Now()
		file := filepath.Join(w.dir, warmUsed)
		if err := os.Chtimes(file, now, now); errors.Is(err, fs.ErrNotExist) {
			_ = os.WriteFile(file, nil, 0o600) // it is only for prune
		}
	case errors.Is(err, store.ErrNotFound) && !damaged:
	case damaged:
		w.discard(err)
	default:
		w.Close()
		return nil, err
	}
	return w, nil
}

// start starts a guest from the state and waits until its agent answers: then it is
// one that works.
func (w *warm) start(ctx context.Context, cfg guest.Config) (*guest.Guest, error) {
	cfg.From = startFrom(w.state)
	g, err := guest.Start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	wait, cancel := context.WithTimeoutCause(ctx, warmPatience, fmt.Errorf("its agent has not answered for %v", warmPatience))
	defer cancel()
	if err := g.Ready(wait); err != nil {
		return nil, errors.Join(err, g.Close())
	}
	return g, nil
}

// discard removes a state that is of no use.
func (w *warm) discard(why error) {
	fmt.Fprintf(os.Stderr, "gondola: the state that is kept of such a machine after its boot is discarded, and the machine booted: %v\n", why)
	if w.state != nil {
		_ = w.state.Close() // it was only read
		w.state = nil
	}
	_ = w.store.Close()
	w.store = nil
	err := removeWarm(w.dir)
	if err == nil {
		w.store, err = store.Open(w.dir, store.Options{Buffer: saveBuffer})
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "gondola: %v\n", err)
	}
}

// removeWarm removes the directory of one machine. Those who have the state open, or
// are saving it, are not disturbed, and nobody finds a half of it.
func removeWarm(dir string) error {
	gone, err := os.MkdirTemp(filepath.Dir(dir), warmGone)
	if err != nil {
		return err
	}
	err = os.Rename(dir, filepath.Join(gone, "0"))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	// Those who have it open may still write to it, a file each: that they have read it
	// all (store.Store.VerifyOnce), or a part of a state.
	for range 10 {
		gerr := os.RemoveAll(gone)
		if !errors.Is(gerr, unix.ENOTEMPTY) {
			return errors.Join(err, gerr)
		}
		time.Sleep(time.Millisecond)
	}
	return errors.Join(err, os.RemoveAll(gone))
}

// keep saves the state of a machine whose agent has just answered, if there is none
// yet, and returns when the machine goes on. The rest is done in the background.
func (w *warm) keep(ctx context.Context, g *guest.Guest) {
	if w.others() == nil {
		return
	}
	ctx, w.cancel = context.WithCancel(ctx)
	once := sync.OnceFunc(func() { close(w.free) })
	w.saving.Go(func() {
		defer once()
		err := w.save(ctx, g, once)
		if err != nil && ctx.Err() == nil && !errors.Is(err, store.ErrExists) && !errors.Is(err, vmm.ErrEnded) {
			fmt.Fprintf(os.Stderr, "gondola: this machine's state after its boot is not kept: %v\n", err)
		}
	})
	<-w.free
}

const (
	calmStep  = 50 * time.Millisecond
	calmShare = 5 // a guest is idle that uses less than 1/calmShare of a processor
	calmSteps = 2 // so many times in a row
	calmMax   = 5 * time.Second
)

// calm waits until a guest that has just come up is idle, going by the processor time
// of its vCPUs, but not for ever: what it is still about to do at its boot, every start
// from the state would do once more.
func calm(ctx context.Context, times func() []time.Duration) {
	sum := func() (t time.Duration) {
		for _, d := range times() {
			t += d
		}
		return t
	}
	tick := time.NewTicker(calmStep)
	defer tick.Stop()
	end := time.After(calmMax)
	for idle, last := 0, sum(); idle < calmSteps; {
		select {
		case <-tick.C:
		case <-end:
			return
		case <-ctx.Done():
			return
		}
		now := sum()
		if idle++; now-last > calmStep/calmShare {
			idle = 0
		}
		last = now
	}
}

// rehearse has a guest do what it does first after each start from the state: be told
// that it is another copy, and run a program. What that costs once (threads and pages of
// the agent, caches of the kernel) is in the state then; on a PVM host it is a fifth of
// such a start. A guest that cannot do it is no worse for that.
func rehearse(ctx context.Context, g *guest.Guest) {
	ctx, cancel := context.WithTimeout(ctx, calmMax)
	defer cancel()
	// An answer means that the agent has been told all that is for the first copy only.
	if g.Agent().Ping(ctx) != nil {
		return
	}
	g.Renew()
	_, _ = g.Agent().Exec(ctx, guestagent.Command{Args: []string{"true"}})
}

func (w *warm) save(ctx context.Context, g *guest.Guest, taken func()) error {
	limit, err := warmMax()
	if err != nil || limit == 0 {
		return err
	}
	vm := g.VM()
	rehearse(ctx, g)
	calm(ctx, vm.CPUTimes)
	about := map[string]string{machineShape: w.shape.String(), "gondola": buildVersion()}
	if len(w.text) <= store.MaxMachineText {
		about["inputs"] = w.text
	}
	m := snapshot.New(snapshot.Config{VM: vm, Store: w.store, Machine: about})
	defer m.Close()
	if _, _, err := m.Save(ctx, snapshot.SaveOptions{Name: warmName, Last: true, Taken: taken}); err != nil {
		return err
	}
	// What is on the disk is read once now, not by the next start.
	st, err := w.store.Get(ctx, warmName)
	if err != nil {
		return err
	}
	defer st.Close()
	if err := w.store.VerifyOnce(ctx, st, nil); err != nil {
		return err
	}
	_, err = pruneWarm(filepath.Dir(w.dir), limit, w.dir)
	return err
}

// Close waits for the state to be kept.
func (w *warm) Close() {
	if w == nil {
		return
	}
	w.saving.Wait()
	w.cancel()
	if w.state != nil {
		_ = w.state.Close() // it was only read
	}
	if w.store != nil {
		_ = w.store.Close()
	}
}

// warmEntry is a state in the cache.
type warmEntry struct {
	Key     string    `json:"key"`
	VCPUs   int       `json:"vcpus,omitempty"`
	Memory  uint64    `json:"memory_bytes,omitempty"`
	Bytes   int64     `json:"disk_bytes"`
	Saved   time.Time `json:"saved,omitzero"`
	Used    time.Time `json:"used,omitzero"`
	Version string    `json:"gondola,omitempty"`
	Inputs  string    `json:"inputs,omitempty"`
	Err     string    `json:"error,omitempty"`
}

// listWarm lists what is kept, the least recently used first.
func listWarm(ctx context.Context, dir string) ([]warmEntry, error) {
	names, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list []warmEntry
	for _, n := range names {
		if !n.IsDir() || len(n.Name()) != 32 {
			continue
		}
		e := warmEntry{Key: n.Name()}
		path := filepath.Join(dir, n.Name())
		files, err := os.ReadDir(path)
		if errors.Is(err, fs.ErrNotExist) { // removed meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			fi, err := f.Info()
			if err != nil {
				continue // removed meanwhile
			}
			if st, ok := fi.Sys().(*syscall.Stat_t); ok {
				e.Bytes += st.Blocks * 512
			}
			if fi.ModTime().After(e.Used) {
				e.Used = fi.ModTime()
			}
		}
		e.describe(ctx, path)
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b warmEntry) int { return a.Used.Compare(b.Used) })
	return list, nil
}

// describe adds what the state says of itself.
func (e *warmEntry) describe(ctx context.Context, path string) {
	fail := func(err error) { e.Err = err.Error() }
	s, err := store.Open(path, store.Options{})
	if err != nil {
		fail(err)
		return
	}
	defer s.Close()
	infos, err := s.List(ctx)
	if err != nil {
		fail(err)
		return
	}
	if len(infos) == 0 {
		fail(errors.New("being made, or given up"))
		return
	}
	i := infos[0]
	if i.Err != nil {
		fail(i.Err)
		return
	}
	e.Saved, e.Version, e.Inputs = i.When, i.Machine["gondola"], i.Machine["inputs"]
	if shape, err := guest.ParseShape(i.Machine[machineShape]); err != nil {
		fail(err)
	} else {
		e.VCPUs, e.Memory = shape.VCPUs, shape.Memory
	}
}

// pruneWarm removes the least recently used states until all that are left, keep
// included, which is not removed, have at most limit bytes. What a process that was
// killed left of a removal goes, too.
func pruneWarm(dir string, limit int64, keep string) (removed []warmEntry, err error) {
	if rest, err := filepath.Glob(filepath.Join(dir, warmGone+"*")); err == nil {
		for _, r := range rest {
			_ = os.RemoveAll(r) // somebody else may be at it
		}
	}
	list, err := listWarm(context.Background(), dir)
	if err != nil {
		return nil, err
	}
	total := int64(0)
	for _, e := range list {
		total += e.Bytes
	}
	for _, e := range list {
		if total <= limit {
			break
		}
		if path := filepath.Join(dir, e.Key); path != keep {
			if err := removeWarm(path); err != nil {
				return removed, err
			}
			total -= e.Bytes
			removed = append(removed, e)
		}
	}
	return removed, nil
}
