package linux

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// Before is what a machine was like before anything was done to it: enough to put it
// back, by whoever finds it (S2.9).
type Before struct {
	Machine string `json:"machine"`
	PID     int    `json:"pid"`
	Start   uint64 `json:"start"` // of the process, in ticks: the number alone may be another's by now
	// Cgroup it was in, and Group that it was moved to; "" if it was not.
	Cgroup string `json:"cgroup,omitempty"`
	Group  string `json:"group,omitempty"`
	// Affinity of threads that were bound, and those with another policy.
	Affinity map[int]string `json:"affinity,omitempty"`
	Policy   []int          `json:"policy,omitempty"`
	// Limits of devices that were changed: bytes a second, 0 for none.
	Limits map[string]uint64 `json:"limits,omitempty"`
	// Target of the balloon, if it was moved.
	Target uint64 `json:"target,omitempty"`
}

// empty: nothing was done.
func (b Before) empty() bool {
	return b.Group == "" && len(b.Affinity) == 0 && len(b.Policy) == 0 && len(b.Limits) == 0 && b.Target == 0
}

// Journal is the file of all Before there are. It is written before anything is
// changed, so that a scheduler that is killed leaves nothing that the next cannot undo.
type Journal struct {
	path string
	all  map[string]Before
}

// ErrJournal: the journal cannot be used.
var ErrJournal = errors.New("the journal of changes")

// OpenJournal reads a journal; one that is not there is empty. What is in it is for
// the caller to undo.
func OpenJournal(path string) (*Journal, error) {
	j := &Journal{path: path, all: map[string]Before{}}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return j, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrJournal, err)
	}
	var list []Before
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("%w: %s is damaged (%w): what it says cannot be undone; look at it, then remove it", ErrJournal, path, err)
	}
	for _, x := range list {
		j.all[x.Machine] = x
	}
	return j, nil
}

// All are the machines that something was done to.
func (j *Journal) All() []Before {
	var list []Before
	for _, n := range slices.Sorted(maps.Keys(j.all)) {
		list = append(list, j.all[n])
	}
	return list
}

// Get is a machine's.
func (j *Journal) Get(machine string) (Before, bool) { b, ok := j.all[machine]; return b, ok }

// Put notes a machine's state and returns when that is on the disk.
func (j *Journal) Put(b Before) error {
	j.all[b.Machine] = b
	return j.write()
}

// Drop forgets a machine: everything is undone, or it has gone.
func (j *Journal) Drop(machine string) error {
	if _, ok := j.all[machine]; !ok {
		return nil
	}
	delete(j.all, machine)
	return j.write()
}

func (j *Journal) write() (err error) {
	if len(j.all) == 0 {
		if err := os.Remove(j.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: %w", ErrJournal, err)
		}
		return nil
	}
	b, err := json.Marshal(j.All())
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w: %w", ErrJournal, err)
		}
	}()
	f, err := os.CreateTemp(filepath.Dir(j.path), ".journal-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails when it has been renamed
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), j.path)
}
