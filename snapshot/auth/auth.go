// Package auth keeps who may ask a machine's monitor for what: principals, their
// secrets hashed with argon2id, and their rights (S5.7). An administrator writes
// the file on the host; the running machine reads it again whenever it changed.
package auth

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Limits of a store.
const (
	MaxPrincipals = 1000
	MaxRights     = 64
	MaxName       = 64   // bytes of a principal's, a right's or a machine's name
	MaxSecret     = 1024 // bytes
	MinSecret     = 8
)

// All as a right allows every operation.
const All = "*"

// Errors of a store; match with errors.Is.
var (
	// ErrDenied: no principal of that name has that secret.
	ErrDenied = errors.New("wrong credentials")
	// ErrExists and ErrNotFound are about principals.
	ErrExists   = errors.New("principal exists")
	ErrNotFound = errors.New("no such principal")
	// ErrInvalid: a name, secret or right cannot be stored.
	ErrInvalid = errors.New("invalid principal")
	// ErrFile: the file cannot be used: others may read or write it, or it is
	// damaged.
	ErrFile = errors.New("unusable credentials file")
)

// Principal is who may ask for something, without the secret.
type Principal struct {
	Name    string    `json:"name"`
	Allow   []string  `json:"allow"` // operations, or All
	Created time.Time `json:"created"`
}

// May tells whether the principal has the right to an operation.
func (p Principal) May(op string) bool {
	return slices.Contains(p.Allow, op) || slices.Contains(p.Allow, All)
}

// DefaultDir is the directory of what is kept for a machine whether or not it runs:
// gondola/machines/NAME in $XDG_STATE_HOME or ~/.local/state. ErrInvalid for a name
// that is no directory's.
func DefaultDir(machine string) (string, error) {
	if err := checkName("machine", machine); err != nil {
		return "", err
	}
	all, err := allMachines()
	return filepath.Join(all, machine), err
}

// allMachines is the directory of DefaultDir's directories.
func allMachines() (string, error) {
	state := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(state) {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("where is the state directory: set XDG_STATE_HOME: %w", err)
		}
		state = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(state, "gondola", "machines"), nil
}

// Machines are the names of the machines that have a file at DefaultPath, sorted.
func Machines() ([]string, error) {
	all, err := allMachines()
	if err != nil {
		return nil, err
	}
	dirs, err := os.ReadDir(all)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, d := range dirs {
		if _, err := os.Lstat(Path(filepath.Join(all, d.Name()))); err == nil && checkName("machine", d.Name()) == nil {
			names = append(names, d.Name())
		}
	}
	return names, nil
}

// Path is where the principals are in a machine's directory.
func Path(dir string) string { return filepath.Join(dir, "auth.json") }

// DefaultPath is Path in DefaultDir.
func DefaultPath(machine string) (string, error) {
	dir, err := DefaultDir(machine)
	if err != nil {
		return "", err
	}
	return Path(dir), nil
}

// Store is a machine's principals. Its methods may be called from any goroutine,
// and other processes may use the same file.
type Store struct {
	path   string
	params Params
	decoy  hash // what an unknown principal is checked against

	mu     sync.Mutex
	stamp  stamp // of what is in known
	known  map[string]entry
	loaded bool

	// proven are secrets that were right: repeating the slow hash for each
	// request of the same program would only slow the machine down. They are
	// kept as a keyed hash, and forgotten when the principal's entry changes.
	key    [32]byte
	proven map[string]proof
}

// proof is a secret that matched hash.
type proof struct {
	hash string
	mac  [sha256.Size]byte
}

// Open is the store at path. The file needs not exist: there are no principals
// then. Add makes it.
func Open(path string) *Store {
	s := &Store{path: path, params: defaultParams, proven: map[string]proof{}}
	_, _ = rand.Read(s.key[:]) // never fails
	s.decoy = hash{Params: s.params, salt: s.key[:saltSize], key: make([]byte, keySize)}
	return s
}

// Add stores a principal and returns its secret, which is a fresh one if secret is
// empty. It fails with ErrInvalid, ErrExists, ErrFile or the system's error; then
// nothing has changed.
func (s *Store) Add(name, secret string, allow []string) (string, error) {
	if err := checkName("principal", name); err != nil {
		return "", err
	}
	allow, err := rights(allow)
	if err != nil {
		return "", err
	}
	if secret == "" {
		secret = rand.Text()
	}
	if len(secret) < MinSecret || len(secret) > MaxSecret {
		return "", fmt.Errorf("%w: a secret of %d bytes; give %d to %d, or none to have one made", ErrInvalid, len(secret), MinSecret, MaxSecret)
	}
	e := entry{
		Principal: Principal{Name: name, Allow: allow, Created: time.Now().UTC().Truncate(time.Second)},
		Hash:      newHash(secret, s.params).String(),
	}
	return secret, s.change(func(es []entry) ([]entry, error) {
		switch {
		case slices.ContainsFunc(es, e.same):
			return nil, fmt.Errorf("%w: %s; remove it first", ErrExists, name)
		case len(es) >= MaxPrincipals:
			return nil, fmt.Errorf("%w: there are %d already, which is the limit", ErrInvalid, len(es))
		}
		return append(es, e), nil
	})
}

// rights are sorted and without repetitions.
func rights(allow []string) ([]string, error) {
	allow = slices.Clone(allow)
	slices.Sort(allow)
	allow = slices.Compact(allow)
	if len(allow) == 0 || len(allow) > MaxRights {
		return nil, fmt.Errorf("%w: %d rights; give 1 to %d operations, or %s", ErrInvalid, len(allow), MaxRights, All)
	}
	for _, op := range allow {
		if err := checkName("right", op); op != All && err != nil {
			return nil, err
		}
	}
	return allow, nil
}

// Allow gives a principal other rights; its secret stays. It fails with ErrInvalid,
// ErrNotFound, ErrFile or the system's error; then nothing has changed.
func (s *Store) Allow(name string, allow []string) error {
	allow, err := rights(allow)
	if err != nil {
		return err
	}
	e := entry{Principal: Principal{Name: name}}
	return s.change(func(es []entry) ([]entry, error) {
		i := slices.IndexFunc(es, e.same)
		if i < 0 {
			return nil, fmt.Errorf("%w: %s", ErrNotFound, name)
		}
		es[i].Allow = allow
		return es, nil
	})
}

// Remove takes a principal away. It fails with ErrNotFound, ErrFile or the
// system's error.
func (s *Store) Remove(name string) error {
	e := entry{Principal: Principal{Name: name}}
	return s.change(func(es []entry) ([]entry, error) {
		n := len(es)
		if es = slices.DeleteFunc(es, e.same); len(es) == n {
			return nil, fmt.Errorf("%w: %s", ErrNotFound, name)
		}
		return es, nil
	})
}

// List gives the principals by name. It fails with ErrFile or the system's error.
func (s *Store) List() ([]Principal, error) {
	known, err := s.load()
	if err != nil {
		return nil, err
	}
	ps := make([]Principal, 0, len(known))
	for _, e := range known {
		ps = append(ps, e.Principal)
	}
	slices.SortFunc(ps, func(a, b Principal) int { return strings.Compare(a.Name, b.Name) })
	return ps, nil
}

// Verify gives the principal whose name and secret these are. A wrong secret and
// an unknown name cost the same time and are the same error, ErrDenied. Other
// errors say that the file could not be read.
func (s *Store) Verify(name, secret string) (Principal, error) {
	known, err := s.load()
	if err != nil {
		return Principal{}, err
	}
	if len(secret) > MaxSecret {
		return Principal{}, ErrDenied
	}
	e, ok := known[name]
	h := e.parsed
	if !ok {
		h = s.decoy
	}
	mac := hmac.New(sha256.New, s.key[:])
	mac.Write([]byte(secret))
	var sum [sha256.Size]byte
	mac.Sum(sum[:0])

	s.mu.Lock()
	p := s.proven[name]
	s.mu.Unlock()
	if hmac.Equal(p.mac[:], sum[:]) && ok && p.hash == e.Hash {
		return e.Principal, nil
	}
	if !h.matches(secret) || !ok {
		return Principal{}, ErrDenied
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known[name].Hash == e.Hash {
		s.proven[name] = proof{e.Hash, sum}
	}
	return e.Principal, nil
}

// checkName holds names to what is safe in file names, command lines and logs.
func checkName(what, name string) error {
	ok := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._@-", r)
	}
	if name == "" || len(name) > MaxName || strings.IndexFunc(name, func(r rune) bool { return !ok(r) }) >= 0 || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "-") {
		return fmt.Errorf("%w: %s %q: give 1 to %d letters, digits or . _ @ -, not beginning with . or -", ErrInvalid, what, name, MaxName)
	}
	return nil
}
