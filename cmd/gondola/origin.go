package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/control"
	"github.com/gondola-vmm/gondola/vmm/guest"
)

// machineShape is where a state says what machine it is of (store.Meta.Machine).
const machineShape = "shape"

// origin is a saved state that a machine is made from.
type origin struct {
	machine  string
	store    *store.Store
	state    *store.State
	shape    guest.Shape
	prefetch bool
}

// parseOrigin splits MACHINE@STATE.
func parseOrigin(s string) (machine, state string, err error) {
	machine, state, ok := strings.Cut(s, "@")
	if !ok {
		return "", "", usageError{fmt.Errorf("%q: want the names of a machine and of one of its states, MACHINE@STATE; gondola state list MACHINE shows them", s)}
	}
	if err := control.CheckName(machine); err != nil {
		return "", "", usageError{err}
	}
	return machine, state, checkState(state)
}

// openOrigin opens a state that a machine can be made from.
func openOrigin(ctx context.Context, from string) (_ *origin, err error) {
	machine, name, err := parseOrigin(from)
	if err != nil {
		return nil, err
	}
	o := &origin{machine: machine}
	if o.store, err = openStates(machine, false, store.Options{}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.Close())
		}
	}()
	if o.state, err = o.store.Get(ctx, name); err != nil {
		return nil, err
	}
	text, ok := o.state.Info().Machine[machineShape]
	if !ok {
		return nil, fmt.Errorf("state %q: %w: it does not say of what machine it is; a running machine like its own can be put back to it (gondola state restore)", name, guest.ErrShape)
	}
	if o.shape, err = guest.ParseShape(text); err != nil {
		return nil, fmt.Errorf("state %q: %w", name, err)
	}
	return o, nil
}

// Close frees what the origin has; what was mapped of the state stays.
func (o *origin) Close() error {
	if o == nil {
		return nil
	}
	var errs []error
	if o.state != nil {
		errs = append(errs, o.state.Close())
	}
	return errors.Join(append(errs, o.store.Close())...)
}

// from is the state for a guest's configuration. The state's files are read and
// checked, unless that was done before and they are as they were then.
func (o *origin) from(ctx context.Context, p *progress) (*guest.From, error) {
	name := o.state.Info().Name
	err := o.store.VerifyOnce(ctx, o.state, func(done, total int64) {
		p.update("verifying "+name, fmt.Sprintf("verifying %s: %s of %s", name, sizeText(done), sizeText(total)))
	})
	if err != nil {
		return nil, err
	}
	if o.prefetch {
		if err := o.state.Memory().Prefetch(); err != nil {
			return nil, err
		}
	}
	return startFrom(o.state), nil
}

// startFrom is an open state for a guest's configuration.
func startFrom(st *store.State) *guest.From {
	return &guest.From{
		Memory: st.Memory(),
		Load: func(ctx context.Context, vm *vmm.VM, restored func()) error {
			return snapshot.Start(ctx, vm, st, restored)
		},
	}
}

// shapeFlags are those of gondola run that a state has decided.
var shapeFlags = []string{"memory", "cpus", "kernel", "initrd", "cmdline", "console", "userland", "copy", "disk-slots", "verbose", "no-host-cmdline",
	"self-decompress", "acpi", "rng", "no-ports", "no-balloon", "cold"}

// openFrom opens the state that --from names and sets the flags that it decides.
func (f *runFlags) openFrom(ctx context.Context, given *pflag.FlagSet) (*origin, error) {
	if f.from == "" {
		if f.prefetch {
			return nil, usageError{errors.New("--prefetch is for --from")}
		}
		return nil, nil
	}
	machine, _, err := parseOrigin(f.from)
	if err != nil {
		return nil, err
	}
	var wrong []string
	given.Visit(func(fl *pflag.Flag) {
		if slices.Contains(shapeFlags, fl.Name) {
			wrong = append(wrong, "--"+fl.Name)
		}
	})
	if wrong != nil {
		return nil, usageError{fmt.Errorf("%s: the state that --from names has decided that already", strings.Join(wrong, ", "))}
	}
	o, err := openOrigin(ctx, f.from)
	if err != nil {
		return nil, err
	}
	o.prefetch = f.prefetch
	if !given.Changed("name") {
		f.name = machine
	}
	f.memory, f.cpus, f.noPorts, f.noBalloon, f.rng = memorySize(o.shape.Memory), o.shape.VCPUs, !o.shape.Ports, o.shape.NoBalloon, o.shape.RNG
	f.diskSlots = o.shape.DiskSlots
	switch o.shape.Console {
	case guest.SerialConsole:
		f.console = "serial"
	case guest.VirtioConsole:
		f.console = "virtio"
	}
	return o, nil
}

// inherit makes a guest one that starts from the state.
func (o *origin) inherit(ctx context.Context, cfg *guest.Config, p *progress) (err error) {
	if o == nil {
		return nil
	}
	if err := o.shape.Apply(cfg); err != nil {
		return fmt.Errorf("state %q: %w", o.state.Info().Name, err)
	}
	cfg.From, err = o.from(ctx, p)
	return err
}

// give hands the state over to the manager of the machine's states if they are those
// of the machine it comes from.
func (o *origin) give(s *states) {
	if o == nil || s == nil || s.machine != o.machine {
		return
	}
	st, err := o.store.GetID(context.Background(), o.state.ID())
	if err != nil { // deleted meanwhile: the machine's next state has no parent
		fmt.Fprintf(os.Stderr, "gondola: %v\n", err)
		return
	}
	s.base = st
}
