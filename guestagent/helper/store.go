//go:build linux

package helper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// name is a registered name and whose it is.
type name struct {
	Name string `cbor:"1,keyasint"`
	UID  uint32 `cbor:"2,keyasint"`
}

// list is the content of the file.
type list struct {
	Version int    `cbor:"1,keyasint"`
	Names   []name `cbor:"2,keyasint"`
}

const listVersion = 1

// store keeps the list of listeners (S5.4) in a file that is replaced as a whole.
type store struct {
	dir string
	mu  sync.Mutex // one save at a time, with the latest list
}

func (s *store) file() string { return filepath.Join(s.dir, "listeners") }

// load gives the names; a file that is not there is none.
func (s *store) load() ([]name, error) {
	if s.dir == "" {
		return nil, nil
	}
	b, err := os.ReadFile(s.file())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parseList(b)
}

// parseList reads the file's content.
func parseList(b []byte) ([]name, error) {
	var l list
	if err := proto.Unmarshal(b, &l); err != nil {
		return nil, fmt.Errorf("not understood: %w", err)
	}
	if l.Version != listVersion {
		return nil, fmt.Errorf("version %d is not known here; %d is", l.Version, listVersion)
	}
	seen := map[string]bool{}
	for _, n := range l.Names {
		if n.Name == "" || len(n.Name) > ports.MaxListener || seen[n.Name] {
			return nil, fmt.Errorf("name %.64q is empty, too long or there twice", n.Name)
		}
		seen[n.Name] = true
	}
	return l.Names, nil
}

// save writes the names that get gives.
func (s *store) save(get func() []name) (err error) {
	if s.dir == "" {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := proto.Marshal(list{listVersion, get()})
	if err != nil {
		return err
	}
	tmp := s.file() + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(s.dir, 0o755); err == nil {
			f, err = os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		}
	}
	if err != nil {
		return err
	}
	if _, err = f.Write(b); err == nil {
		err = f.Sync() // the directory may be on a disk
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, s.file())
	}
	if err != nil {
		_ = os.Remove(tmp)
	}
	return err
}
