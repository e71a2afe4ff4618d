//go:build !lean

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/scheduler/fleet"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// The state of fleets, beside the directories of running machines:
//
//	$XDG_RUNTIME_DIR/gondola/.fleets/    (a name that no machine can have)
//	    NAME/
//	        lock           held by the supervisor, whose process is in it
//	        state.json     fleetState, what a later supervisor has to know
//	        socket         HTTP: /status, /reload, /stop, /metrics
//	        log            what a supervisor in the background prints
//	        outcome-NAME   the exit code of a machine that has ended
const fleetsDir = ".fleets"

// fleetState survives its supervisor.
type fleetState struct {
	Name     string         `json:"name"`
	File     string         `json:"file"` // absolute
	Text     string         `json:"text"` // of the file, as it was read
	Started  time.Time      `json:"started"`
	Machines map[string]int `json:"machines"` // processes of machines
}

// fleetStatus is what a supervisor, or in its absence its state, says of a fleet.
type fleetStatus struct {
	Name      string          `json:"name"`
	File      string          `json:"file"`
	Isolation fleet.Isolation `json:"isolation"`
	Policy    string          `json:"policy,omitempty"`
	PID       int             `json:"pid"` // of the supervisor, 0 if there is none
	Metrics   string          `json:"metrics,omitempty"`
	Started   time.Time       `json:"started"`
	Machines  []fleet.Status  `json:"machines"`
}

// fleetDir is the directory of one fleet.
type fleetDir struct {
	path string
	lock *os.File // nil: not the supervisor
}

var (
	// errSupervised: another process holds the fleet.
	errSupervised = errors.New("the fleet is supervised by another process")
	// errNoFleet: there is no fleet of this name.
	errNoFleet = errors.New("no such fleet is up")
)

func fleetsPath() (string, error) {
	home, err := openHome()
	if err != nil {
		return "", err
	}
	defer home.Close()
	path := filepath.Join(home.Path(), fleetsDir)
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return path, nil
}

// findFleet looks for a fleet by name; the error is errNoFleet if there is none.
func findFleet(name string) (*fleetDir, error) {
	if err := control.CheckName(name); err != nil {
		return nil, usageError{err}
	}
	all, err := fleetsPath()
	if err != nil {
		return nil, err
	}
	d := &fleetDir{path: filepath.Join(all, name)}
	if _, err := os.Stat(d.file("state.json")); err != nil {
		return nil, fmt.Errorf("fleet %s: %w: gondola fleet ps shows those that are", name, errNoFleet)
	}
	return d, nil
}

// claimFleet makes this process the supervisor of a fleet, which may have been left
// by another one.
func claimFleet(name string) (*fleetDir, error) {
	all, err := fleetsPath()
	if err != nil {
		return nil, err
	}
	d := &fleetDir{path: filepath.Join(all, name)}
	for {
		if err := os.Mkdir(d.path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		if d.lock, err = os.OpenFile(d.file("lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
			if errors.Is(err, fs.ErrNotExist) { // removed in between
				continue
			}
			return nil, err
		}
		if err := unix.Flock(int(d.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			pid := readPID(d.lock)
			d.lock.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("fleet %s: %w, %d", name, errSupervised, pid)
			}
			return nil, fmt.Errorf("fleet %s: lock: %w", name, err)
		}
		// The directory may have been removed by a supervisor that ended.
		mine, err := d.lock.Stat()
		if err != nil {
			return nil, errors.Join(err, d.lock.Close())
		}
		if there, err := os.Stat(d.file("lock")); err == nil && os.SameFile(mine, there) {
			break
		}
		d.lock.Close()
	}
	err = d.lock.Truncate(0)
	if err == nil {
		_, err = d.lock.WriteAt([]byte(strconv.Itoa(os.Getpid())), 0)
	}
	if err != nil {
		return nil, errors.Join(err, d.lock.Close())
	}
	return d, nil
}

func readPID(f *os.File) int {
	b := make([]byte, 16)
	n, _ := f.ReadAt(b, 0)                                   // short, always
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b[:n]))) // 0 is not known
	return pid
}

// supervisor is the process that supervises the fleet, 0 if none does.
func (d *fleetDir) supervisor() int {
	f, err := os.Open(d.file("lock"))
	if err != nil {
		return 0
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil {
		return 0
	}
	return readPID(f)
}

func (d *fleetDir) name() string               { return filepath.Base(d.path) }
func (d *fleetDir) file(name string) string    { return filepath.Join(d.path, name) }
func (d *fleetDir) outcome(name string) string { return d.file("outcome-" + name) }

// remove forgets the fleet.
func (d *fleetDir) remove() error {
	err := os.RemoveAll(d.path)
	if d.lock != nil {
		err = errors.Join(err, d.lock.Close())
	}
	return err
}

func (d *fleetDir) read() (s fleetState, err error) {
	b, err := os.ReadFile(d.file("state.json"))
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		return s, fmt.Errorf("state of fleet %s: %w", d.name(), err)
	}
	return s, nil
}

func (d *fleetDir) write(s fleetState) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return writeWhole(d.file("state.json"), b)
}

// at calls f with a path of the socket that is short enough for an address.
func (d *fleetDir) at(f func(path string) error) error {
	dir, err := os.Open(d.path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return f(fmt.Sprintf("/proc/self/fd/%d/socket", dir.Fd()))
}

func (d *fleetDir) listen() (l *net.UnixListener, err error) {
	_ = os.Remove(d.file("socket")) // of a supervisor that was killed
	err = d.at(func(path string) error {
		if l, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}); err == nil {
			l.SetUnlinkOnClose(false) // remove does it, by its real path
		}
		return err
	})
	return l, err
}

// client speaks with the supervisor.
func (d *fleetDir) client() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (c net.Conn, err error) {
			err = d.at(func(path string) error {
				c, err = (&net.Dialer{}).DialContext(ctx, "unix", path)
				return err
			})
			return c, err
		},
	}}
}

// reloadRequest is the body of /reload.
type reloadRequest struct {
	File   string `json:"file"`
	Text   string `json:"text"`
	Revive bool   `json:"revive"`
}

// reloadReply is the answer.
type reloadReply struct {
	Changes  []fleet.Change `json:"changes,omitempty"`
	Problems fleet.Problems `json:"problems,omitempty"`
	Error    string         `json:"error,omitempty"`
}

// call asks the supervisor; path may have a query.
func (d *fleetDir) call(ctx context.Context, method, path string, body, reply any) error {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		r = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://fleet"+path, r)
	if err != nil {
		return err
	}
	resp, err := d.client().Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err
		}
		return fmt.Errorf("fleet %s: its supervisor does not answer: %w", d.name(), err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return fmt.Errorf("fleet %s: its supervisor: %w", d.name(), err)
	}
	if resp.StatusCode/100 != 2 && !json.Valid(b) {
		return fmt.Errorf("fleet %s: its supervisor says %s: %s", d.name(), resp.Status, bytes.TrimSpace(b))
	}
	return json.Unmarshal(b, reply)
}

// status is the supervisor's word or, without one, what can be found out.
func (d *fleetDir) status(ctx context.Context) (fleetStatus, error) {
	if d.supervisor() != 0 {
		var s fleetStatus
		ctx, cancel := context.WithTimeout(ctx, answerTimeout)
		defer cancel()
		return s, d.call(ctx, http.MethodGet, "/status", nil, &s)
	}
	st, err := d.read()
	if err != nil {
		return fleetStatus{}, err
	}
	s := fleetStatus{Name: d.name(), File: st.File, Started: st.Started, Machines: []fleet.Status{}}
	f, err := fleet.Parse([]byte(st.Text), fleet.Options{File: st.File, Dir: filepath.Dir(st.File)})
	if err != nil {
		return s, fmt.Errorf("state of fleet %s: %w", d.name(), err)
	}
	s.Isolation, s.Policy = f.Isolation, f.Policy
	left, err := fleetMachines(ctx, d.name())
	if err != nil {
		return s, err
	}
	for i := range f.Machines {
		m := fleet.Status{Name: f.Machines[i].Name, State: fleet.Stopped, Note: "nobody supervises it", After: f.Machines[i].After}
		if info, ok := left[m.Name]; ok {
			m.State, m.PID, m.Hash, m.Since = fleet.Up, info.PID, info.Labels[labelSpec], time.Unix(0, info.Started)
		}
		s.Machines = append(s.Machines, m)
	}
	return s, nil
}

// fleetMachines are the running machines with the label of a fleet, by name.
func fleetMachines(ctx context.Context, name string) (map[string]control.Info, error) {
	list, err := machines(ctx, true, "")
	if err != nil {
		return nil, err
	}
	found := map[string]control.Info{}
	for _, m := range list {
		if m.Labels[labelFleet] == name {
			found[m.Name] = m
		}
	}
	return found, nil
}

// fleetNames are the fleets that there are.
func fleetNames() ([]string, error) {
	all, err := fleetsPath()
	if err != nil {
		return nil, err
	}
	files, err := os.ReadDir(all)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, f := range files {
		if _, err := os.Stat(filepath.Join(all, f.Name(), "state.json")); err == nil {
			names = append(names, f.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}
