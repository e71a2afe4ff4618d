package scheduler

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"
)

// Entry is what is kept of a decision, or of what was measured afterwards: one of the
// two is nil (S2.10).
type Entry struct {
	Time     time.Time `json:"time"`
	Run      int64     `json:"run"` // the scheduler's start, UNIX nanoseconds: IDs count within it
	Decision *Decision `json:"decision,omitempty"`
	Measured *Measured `json:"measured,omitempty"`
}

// Explained is a decision with what became of it; Measured is nil if that is not
// known yet, or never will be.
type Explained struct {
	Run int64 `json:"run"`
	Decision
	Measured *Measured `json:"measured,omitempty"`
}

// Recorder keeps decisions.
type Recorder interface {
	// Record keeps the decisions of a plan. What it has returned for is kept
	// even if the process is killed.
	Record(run int64, p Plan) error
	// History returns the latest n decisions, oldest first, of one machine, or
	// of all if its name is ""; all of them if n is 0.
	History(machine string, n int) ([]Explained, error)
	Close() error
}

// Log is a Recorder in a file of JSON lines that only grows, up to a size; then it
// becomes NAME.1, which is replaced. It may be used by several goroutines, and read
// by other processes while one writes.
type Log struct {
	path string
	max  int64

	mu   sync.Mutex
	f    *os.File
	size int64
}

// maxLine bounds a line of a log.
const maxLine = 1 << 20

// DefaultLogSize is where a log is turned over.
const DefaultLogSize = 16 << 20

// OpenLog opens a log for writing, and makes it if it is not there; max of 0 is
// DefaultLogSize.
func OpenLog(path string, max int64) (*Log, error) {
	if max <= 0 {
		max = DefaultLogSize
	}
	l := &Log{path: path, max: max}
	if err := l.open(); err != nil {
		return nil, err
	}
	return l, nil
}

// open opens the file, and ends a line that was cut off by a crash.
func (l *Log) open() error {
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("decisions are not kept: %w", err)
	}
	fi, err := f.Stat()
	if err == nil && fi.Size() > 0 {
		var b [1]byte
		if _, err = f.ReadAt(b[:], fi.Size()-1); err == nil && b[0] != '\n' {
			_, err = f.WriteString("\n")
		}
	}
	if err != nil {
		return fmt.Errorf("decisions are not kept: %w", errors.Join(err, f.Close()))
	}
	l.f, l.size = f, fi.Size()
	return nil
}

// Record implements Recorder.
func (l *Log) Record(run int64, p Plan) error {
	if len(p.Decisions)+len(p.Measured) == 0 {
		return nil
	}
	var b []byte
	line := func(e Entry) error {
		j, err := json.Marshal(e)
		b = append(append(b, j...), '\n')
		return err
	}
	for i := range p.Decisions {
		if err := line(Entry{Time: p.Time, Run: run, Decision: &p.Decisions[i]}); err != nil {
			return err
		}
	}
	for i := range p.Measured {
		if err := line(Entry{Time: p.Time, Run: run, Measured: &p.Measured[i]}); err != nil {
			return err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return fs.ErrClosed
	}
	if l.size+int64(len(b)) > l.max && l.size > 0 {
		if err := errors.Join(os.Rename(l.path, l.path+".1"), l.f.Close()); err != nil {
			return fmt.Errorf("decisions: %w", err)
		}
		if err := l.open(); err != nil {
			return err
		}
	}
	n, err := l.f.Write(b)
	l.size += int64(n)
	if err != nil {
		return fmt.Errorf("decisions: %w", err)
	}
	return nil
}

// Close closes the file.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	err := l.f.Close()
	l.f = nil
	return err
}

// History implements Recorder.
func (l *Log) History(machine string, n int) ([]Explained, error) {
	return ReadHistory(l.path, machine, n)
}

// ReadHistory is Log.History of a log that another process may be writing. Without a
// file there is no history.
func ReadHistory(path, machine string, n int) ([]Explained, error) {
	type key struct {
		run int64
		id  int
	}
	var list []Explained
	index := map[key]int{}
	for _, p := range []string{path + ".1", path} {
		f, err := os.Open(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("history of decisions: %w", err)
		}
		err = readEntries(f, func(e Entry) {
			switch {
			case e.Decision != nil && (machine == "" || e.Decision.Machine == machine || e.Decision.From == machine):
				index[key{e.Run, e.Decision.ID}] = len(list)
				list = append(list, Explained{Run: e.Run, Decision: *e.Decision})
			case e.Measured != nil:
				if i, ok := index[key{e.Run, e.Measured.Decision}]; ok {
					list[i].Measured = e.Measured
				}
			}
		})
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, fmt.Errorf("history of decisions: %s: %w", p, err)
		}
	}
	if n > 0 && len(list) > n {
		list = slices.Clone(list[len(list)-n:])
	}
	return list, nil
}

// readEntries reads lines and passes over those that are not understood: a crash cuts
// one off, and a newer gondola knows others.
func readEntries(r io.Reader, f func(Entry)) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLine)
	for s.Scan() {
		var e Entry
		if json.Unmarshal(s.Bytes(), &e) == nil {
			f(e)
		}
	}
	return s.Err()
}
