package top

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func rows() []Row {
	return []Row{
		{Name: "web", Fleet: "shop", State: "running", Rated: true, CPU: 0.5, Wait: 0.01, Memory: 256 << 20, Balloon: true, Target: 128 << 20, Actual: 200 << 20, PSS: 90 << 20, Class: "network", ClassBy: "counters", Net: 2 << 20},
		{Name: "db", Fleet: "shop", State: "running", Rated: true, CPU: 0.1, Exits: 12345, Memory: 512 << 20, PSS: 300 << 20, Class: "disk", ClassBy: "scheduler", Decision: "gets 0.5 processors", TimeCritical: true, Devices: []Device{{Name: "vda", Kind: "disk", Limits: "none"}}},
		{Name: "new", State: "booting"},
		{Name: "deaf", State: "silent", Problem: "the machine does not answer"},
	}
}

func names(rows []Row) string {
	var n []string
	for _, r := range rows {
		n = append(n, r.Name)
	}
	return strings.Join(n, " ")
}

func TestSelect(t *testing.T) {
	for _, tc := range []struct {
		filter, sort string
		reverse      bool
		want         string
	}{
		{"", "cpu", false, "web db deaf new"},
		{"", "cpu", true, "deaf new db web"},
		{"", "name", false, "db deaf new web"},
		{"", "pss", false, "db web deaf new"},
		{"", "nonsense", false, "db deaf new web"},
		{"SHOP run", "name", false, "db web"},
		{"shop disk", "name", false, "db"},
		{"nobody", "name", false, ""},
	} {
		assert.Equal(t, tc.want, names(Select(rows(), tc.filter, tc.sort, tc.reverse)), tc)
	}
	all := rows()
	Select(all, "web", "name", true)
	assert.Equal(t, rows(), all, "the rows are not touched")
	for _, k := range SortKeys() {
		assert.Len(t, Select(all, "", k, false), 4, k)
	}
}

func TestText(t *testing.T) {
	lines := Text(Select(rows(), "", "name", false))
	require.Len(t, lines, 5)
	assert.Contains(t, lines[0], "LAST DECISION")
	assert.Regexp(t, `^db +running +10\.0 +0\.0 +!disk +12K `, lines[1])
	assert.Contains(t, lines[2], "does not answer")
	assert.Regexp(t, `^new +booting +- +- +- `, lines[3])
	assert.Regexp(t, `^web .* network\? .* 128M +200M .* 56M … +shop`, lines[4])
	assert.Equal(t, "1.0K", size(1024))
	assert.Equal(t, "1023", size(1023))
	assert.Equal(t, "10M", size(10<<20))
	assert.Equal(t, "1.0M", count(999999))
	assert.Equal(t, "0", rate(-1))
}

// acts notes what is done.
type acts struct {
	log  []string
	fail error
}

func (a *acts) did(s ...string) error { a.log = append(a.log, strings.Join(s, " ")); return a.fail }

func (a *acts) Stop(_ context.Context, name string) error { return a.did("stop", name) }
func (a *acts) SetPaused(_ context.Context, name string, paused bool) error {
	if paused {
		return a.did("pause", name)
	}
	return a.did("resume", name)
}
func (a *acts) Balloon(_ context.Context, name, to string) error { return a.did("balloon", name, to) }
func (a *acts) Limits(_ context.Context, name, l string) error   { return a.did("limits", name, l) }
func (a *acts) Shell(name string) *exec.Cmd                      { a.did("shell", name); return exec.Command("true") }

// screen drives a model as a terminal would.
type screen struct {
	t    *testing.T
	m    *Model
	acts *acts
	snap Snapshot
	err  error
}

func newScreen(t *testing.T) *screen {
	s := &screen{t: t, acts: &acts{}, snap: Snapshot{Time: time.Unix(0, 0), Machines: rows()}}
	s.m = New(Config{Look: func(context.Context) (Snapshot, error) { return s.snap, s.err }, Actions: s.acts})
	s.send(tea.WindowSizeMsg{Width: 140, Height: 30})
	s.look()
	return s
}

// look performs a look as the timer would begin it.
func (s *screen) look() { s.send(s.m.look()()) }

func (s *screen) send(msg tea.Msg) tea.Cmd {
	s.t.Helper()
	_, cmd := s.m.Update(msg)
	for i, line := range strings.Split(s.m.text(), "\n") {
		require.NotContains(s.t, line, "\x1b[2J", "line %d", i)
	}
	return cmd
}

// press sends keys and performs the command of the last one.
func (s *screen) press(keys ...string) {
	s.t.Helper()
	special := map[string]rune{"enter": tea.KeyEnter, "esc": tea.KeyEscape, "up": tea.KeyUp, "down": tea.KeyDown, "backspace": tea.KeyBackspace, "right": tea.KeyRight, "end": tea.KeyEnd}
	for i, k := range keys {
		msg := tea.KeyPressMsg{Code: special[k]}
		if special[k] == 0 {
			msg = tea.KeyPressMsg{Code: rune(k[0]), Text: k}
		}
		if cmd := s.send(msg); cmd != nil && i == len(keys)-1 {
			if done, ok := cmd().(doneMsg); ok {
				s.send(done)
			}
		}
	}
}

func TestModel(t *testing.T) {
	s := newScreen(t)
	text := s.m.text()
	assert.Contains(t, text, "4 machines")
	assert.Contains(t, text, "CPU↓")
	assert.Equal(t, "web", s.m.selected)

	// The selection stays with its machine, however it is sorted.
	s.press("down")
	assert.Equal(t, "db", s.m.selected)
	s.press("r")
	assert.Equal(t, "db", s.m.selected)
	assert.Equal(t, "deaf new db web", names(s.m.shown))
	s.press(">")
	assert.Equal(t, "wait", s.m.sort)
	s.press("<", "<", "<", "<")
	assert.Equal(t, "last-decision", s.m.sort)

	// Details, and back.
	s.press("enter")
	assert.Contains(t, s.m.text(), "last decision: gets 0.5 processors")
	assert.Contains(t, s.m.text(), "vda: disk")
	s.press("esc")
	assert.NotContains(t, s.m.text(), "vda: disk")

	// A filter is applied while it is typed.
	s.press("/", "w", "e", "b")
	assert.Equal(t, "web", names(s.m.shown))
	s.press("enter")
	assert.Contains(t, s.m.text(), `1 match "web"`)
	s.press("esc")
	assert.Len(t, s.m.shown, 4)
	s.press("?")
	assert.Contains(t, s.m.text(), "Any key goes back")
	s.press("q")
	assert.False(t, s.m.quit, "any key goes back, and nothing else")
	s.press("q")
	assert.True(t, s.m.quit)
}

func TestActions(t *testing.T) {
	s := newScreen(t)
	s.press("s", "n")
	assert.Empty(t, s.acts.log)
	s.press("s")
	assert.Contains(t, s.m.text(), "stop web? y/n")
	s.press("y")
	s.press("p")
	s.press("b", "backspace", "backspace", "backspace", "backspace", "6", "4", "M", "enter")
	assert.Contains(t, s.m.text(), "web shall have 64M")
	s.press("l") // it has no devices
	assert.Contains(t, s.m.text(), "no disks and networks")
	s.press("down", "b")
	assert.Contains(t, s.m.text(), "db has no balloon")
	s.press("l", "b", "p", "s", "=", "1", "M", "enter")
	s.acts.fail = errors.New("machine db: no")
	s.press("p")
	assert.Contains(t, s.m.text(), "machine db: no")
	s.press("x")
	assert.Equal(t, []string{"stop web", "pause web", "balloon web 64M", "limits db vda,bps=1M", "pause db", "shell db"}, s.acts.log)
}

// A machine that vanishes takes nothing with it: not the selection, and no question
// that was about it.
func TestVanish(t *testing.T) {
	s := newScreen(t)
	s.press("enter", "s")
	s.snap.Machines = rows()[1:]
	s.look()
	assert.Equal(t, browsing, s.m.mode)
	assert.Contains(t, s.m.text(), "web has gone")
	assert.Equal(t, "db", s.m.selected)
	s.press("y")
	assert.Empty(t, s.acts.log, "the answer is not about another machine")
	s.snap.Machines = nil
	s.look()
	assert.Contains(t, s.m.text(), "no machine runs")
	s.press("s", "y")
	s.press("enter")
	s.press("down")
	assert.Empty(t, s.acts.log)
	s.snap.Machines = rows()
	s.look()
	assert.Len(t, s.m.shown, 4)
	s.err = errors.New("the directory has gone")
	s.look()
	assert.Contains(t, s.m.text(), "the directory has gone")
	assert.Len(t, s.m.shown, 4, "what was seen last stays")
}

// Every size of a window works, and no line is wider than it.
func TestWindows(t *testing.T) {
	s := newScreen(t)
	s.press("enter")
	for _, w := range []int{1, 10, 40, 80, 132, 250} {
		for _, h := range []int{1, 5, 24, 80} {
			s.send(tea.WindowSizeMsg{Width: w, Height: h})
			assert.NotEmpty(t, s.m.text())
			assert.NotEmpty(t, s.m.View().Content)
		}
	}
	s.send(tea.WindowSizeMsg{Width: 60, Height: 24})
	assert.NotContains(t, s.m.text(), "LAST DECISION")
	s.send(tea.WindowSizeMsg{Width: 200, Height: 24})
	assert.Contains(t, s.m.text(), "LAST DECISION")
	assert.NotNil(t, s.m.Init())
	assert.NotNil(t, s.send(tickMsg{}))
}
