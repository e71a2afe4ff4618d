package fleet

import (
	"fmt"
	"maps"
	"slices"
)

// Change is what becomes of one machine on the way from one fleet file to another.
type Change struct {
	Machine string `json:"machine"`
	Action  Action `json:"action"`
	Why     string `json:"why,omitempty"`
}

// Action is what is done with a machine.
type Action string

// Actions.
const (
	Add     Action = "add"     // it is new: started
	Remove  Action = "remove"  // it is gone from the file: stopped
	Replace Action = "replace" // stopped and started: what changed cannot be changed while it runs
	Tune    Action = "tune"    // changed while it runs
	Keep    Action = "keep"    // nothing changed
)

// Diff tells how to get from one fleet to another, by machine: first what is removed,
// then the machines of the new one in its order.
func Diff(from, to *Fleet) []Change {
	var list []Change
	old := map[string]*Machine{}
	if from != nil {
		for i := range from.Machines {
			old[from.Machines[i].Name] = &from.Machines[i]
		}
	}
	wanted := map[string]bool{}
	for i := range to.Machines {
		wanted[to.Machines[i].Name] = true
	}
	for _, n := range slices.Sorted(maps.Keys(old)) {
		if !wanted[n] {
			list = append(list, Change{n, Remove, "not in the file any more"})
		}
	}
	for i := range to.Machines {
		m := &to.Machines[i]
		o := old[m.Name]
		switch {
		case o == nil:
			list = append(list, Change{m.Name, Add, "new"})
		case o.Hash() != m.Hash():
			list = append(list, Change{m.Name, Replace, "changed: " + changed(o, m)})
		case changed(o, m) != "":
			list = append(list, Change{m.Name, Tune, "changed: " + changed(o, m)})
		default:
			list = append(list, Change{m.Name, Keep, ""})
		}
	}
	return list
}

// changed names the keys in which two descriptions differ.
func changed(a, b *Machine) string {
	s := ""
	for _, f := range []struct {
		key  string
		same bool
	}{
		{"kernel", a.Kernel == b.Kernel}, {"initrd", a.Initrd == b.Initrd}, {"cmdline", a.Cmdline == b.Cmdline},
		{"userland", a.Userland == b.Userland}, {"image", a.Image == b.Image}, {"memory", a.Memory == b.Memory},
		{"memory-min", a.Min() == b.Min()}, {"memory-max", a.Max() == b.Max()}, {"vcpus", a.VCPUs == b.VCPUs},
		{"shares", a.Shares == b.Shares}, {"time-critical", a.TimeCritical == b.TimeCritical},
		{"command", slices.Equal(a.Command, b.Command)}, {"env", maps.Equal(a.Env, b.Env)}, {"workdir", a.WorkDir == b.WorkDir},
		{"user", a.User == b.User}, {"copy", slices.Equal(a.Copy, b.Copy)}, {"disks", slices.Equal(a.Disks, b.Disks)},
		{"disk-slots", a.DiskSlots == b.DiskSlots}, {"net", a.Net == b.Net}, {"ports", slices.Equal(a.Ports, b.Ports)},
		{"balloon", a.NoBalloon == b.NoBalloon}, {"rng", a.RNG == b.RNG}, {"verbose", a.Verbose == b.Verbose},
		{"after", slices.Equal(a.After, b.After)}, {"restart", a.Restart == b.Restart}, {"stop-timeout", a.StopTimeout == b.StopTimeout},
	} {
		if !f.same {
			if s != "" {
				s += ", "
			}
			s += f.key
		}
	}
	return s
}

// Machine returns the machine of a name, nil if there is none.
func (f *Fleet) Machine(name string) *Machine {
	for i := range f.Machines {
		if f.Machines[i].Name == name {
			return &f.Machines[i]
		}
	}
	return nil
}

// Waves are the machines in the order of their starts: those of a wave need only
// those of the waves before. Stops go the other way. What after: names and the fleet
// has not is ignored.
func (f *Fleet) Waves() [][]string {
	wave, index := map[string]int{}, make(map[string]*Machine, len(f.Machines))
	for i := range f.Machines {
		index[f.Machines[i].Name] = &f.Machines[i]
	}
	var depth func(name string, left int) int
	depth = func(name string, left int) int {
		if d, ok := wave[name]; ok {
			return d
		}
		d := 0
		if m := index[name]; m != nil && left > 0 { // Parse refuses circles
			for _, a := range m.After {
				if index[a] != nil {
					d = max(d, depth(a, left-1)+1)
				}
			}
		}
		wave[name] = d
		return d
	}
	var waves [][]string
	for i := range f.Machines {
		d := depth(f.Machines[i].Name, len(f.Machines))
		for len(waves) <= d {
			waves = append(waves, nil)
		}
		waves[d] = append(waves[d], f.Machines[i].Name)
	}
	return waves
}

// String says what is done, in a line.
func (c Change) String() string {
	if c.Why == "" {
		return fmt.Sprintf("%s: %s", c.Machine, c.Action)
	}
	return fmt.Sprintf("%s: %s, %s", c.Machine, c.Action, c.Why)
}
