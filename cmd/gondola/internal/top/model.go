package top

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"charm.land/bubbles/v2/table"
	"charm.land/bubbles/v2/textinput"
	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"
)

// Actions act on a machine. They may take a while, and end when ctx does.
type Actions interface {
	Stop(ctx context.Context, name string) error
	// SetPaused pauses a machine or lets it go on.
	SetPaused(ctx context.Context, name string, paused bool) error
	// Balloon sets how much memory the guest has, like 64M.
	Balloon(ctx context.Context, name, target string) error
	// Limits sets rate limits, as gondola limits takes them: vda,bps=1M.
	Limits(ctx context.Context, name, limits string) error
	// Shell is a command that is a shell in the guest.
	Shell(name string) *exec.Cmd
}

// Config of the view.
type Config struct {
	// Look returns the machines as they are now.
	Look     func(context.Context) (Snapshot, error)
	Actions  Actions
	Interval time.Duration
	Sort     string
	Reverse  bool
	Filter   string
	Context  context.Context
}

// mode is what keys mean.
type mode int

const (
	browsing  mode = iota
	filtering      // typing a filter
	balloon        // typing a target
	limiting       // typing limits
	stopping       // to be confirmed
	helping
)

// Model is the view's state, a tea.Model.
type Model struct {
	cfg      Config
	snap     Snapshot
	shown    []Row // selected and sorted
	selected string
	sort     string
	reverse  bool
	filter   string
	details  bool
	mode     mode
	input    textinput.Model
	table    table.Model
	message  string // what the last action came to
	err      error  // of the last look
	looked   bool
	width    int
	height   int
	quit     bool
}

// Messages.
type (
	lookedMsg struct {
		snap Snapshot
		err  error
	}
	tickMsg struct{}
	doneMsg struct{ text string }
)

// New makes the view.
func New(c Config) *Model {
	if c.Interval <= 0 {
		c.Interval = time.Second
	}
	if c.Context == nil {
		c.Context = context.Background()
	}
	m := &Model{cfg: c, sort: c.Sort, reverse: c.Reverse, filter: c.Filter, width: 80, height: 24}
	if columnOf(m.sort) < 0 {
		m.sort = "cpu"
	}
	m.input = textinput.New()
	m.input.CharLimit = 120
	m.table = table.New(table.WithFocused(true))
	st := table.DefaultStyles()
	st.Header = st.Header.Padding(0, 1, 0, 0)
	st.Cell = st.Cell.Padding(0, 1, 0, 0)
	st.Selected = lipgloss.NewStyle().Reverse(true)
	m.table.SetStyles(st)
	m.layout()
	return m
}

// Init implements tea.Model.
func (m *Model) Init() tea.Cmd { return m.look() }

func (m *Model) look() tea.Cmd {
	return func() tea.Msg {
		s, err := m.cfg.Look(m.cfg.Context)
		return lookedMsg{s, err}
	}
}

// Update implements tea.Model.
func (m *Model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
		m.layout()
	case lookedMsg:
		m.err = msg.err
		if msg.err == nil {
			m.snap, m.looked = msg.snap, true
		}
		m.refresh()
		return m, tea.Tick(m.cfg.Interval, func(time.Time) tea.Msg { return tickMsg{} })
	case tickMsg:
		return m, m.look()
	case doneMsg:
		m.message = msg.text
	case tea.KeyPressMsg:
		return m, m.key(msg)
	}
	return m, nil
}

// key does what a key means now.
func (m *Model) key(k tea.KeyPressMsg) tea.Cmd {
	if k.String() == "ctrl+c" {
		m.quit = true
		return tea.Quit
	}
	switch m.mode {
	case filtering, balloon, limiting:
		return m.typed(k)
	case stopping:
		m.mode = browsing
		if name := m.selected; k.String() == "y" {
			m.message = "stopping " + name + " …"
			return m.act(name+" has stopped", func(ctx context.Context) error { return m.cfg.Actions.Stop(ctx, name) })
		}
		m.message = "not stopped"
		return nil
	case helping:
		m.mode = browsing
		return nil
	}
	m.message = ""
	switch s := k.String(); s {
	case "q":
		m.quit = true
		return tea.Quit
	case "esc":
		if m.details {
			m.details = false
		} else {
			m.filter = ""
		}
		m.refresh()
	case "?", "h":
		m.mode = helping
	case "<", ">", "left", "right":
		i, n := columnOf(m.sort), len(columns)
		if s == "<" || s == "left" {
			i += n - 2
		}
		m.sort = key(columns[(i+1)%n].title)
		m.refresh()
	case "r":
		m.reverse = !m.reverse
		m.refresh()
	case "/":
		return m.ask(filtering, "filter: ", m.filter)
	case "enter":
		m.details = !m.details && m.selected != ""
		m.layout()
	case "s", "k", "p", "b", "l", "x":
		r := m.row()
		if r == nil {
			m.message = "no machine is selected"
			return nil
		}
		return m.command(s, *r)
	default:
		m.table, _ = m.table.Update(k)
		if i := m.table.Cursor(); i >= 0 && i < len(m.shown) {
			m.selected = m.shown[i].Name
		}
	}
	return nil
}

// command begins what a key does with the selected machine.
func (m *Model) command(k string, r Row) tea.Cmd {
	switch k {
	case "s", "k":
		m.mode = stopping
	case "p":
		pause := r.State != "paused"
		did := r.Name + " goes on"
		if pause {
			did = r.Name + " is paused"
		}
		return m.act(did, func(ctx context.Context) error { return m.cfg.Actions.SetPaused(ctx, r.Name, pause) })
	case "b":
		if !r.Balloon {
			m.message = r.Name + " has no balloon"
			return nil
		}
		return m.ask(balloon, "memory for "+r.Name+": ", size(float64(r.Target)))
	case "l":
		first := ""
		if len(r.Devices) > 0 {
			first = r.Devices[0].Name + ","
		} else {
			m.message = r.Name + " has no disks and networks"
			return nil
		}
		return m.ask(limiting, "limits for "+r.Name+" (DEVICE,bps=SIZE,iops=N): ", first)
	case "x":
		return tea.ExecProcess(m.cfg.Actions.Shell(r.Name), func(err error) tea.Msg {
			if err != nil {
				return doneMsg{fmt.Sprintf("shell in %s: %v", r.Name, err)}
			}
			return doneMsg{"back from " + r.Name}
		})
	}
	return nil
}

// act performs an action beside the view.
func (m *Model) act(did string, f func(context.Context) error) tea.Cmd {
	return func() tea.Msg {
		if err := f(m.cfg.Context); err != nil {
			return doneMsg{err.Error()}
		}
		return doneMsg{did}
	}
}

// ask lets the user type a line.
func (m *Model) ask(to mode, prompt, value string) tea.Cmd {
	m.mode = to
	m.input.Prompt = prompt
	m.input.SetValue(value)
	m.input.CursorEnd()
	return m.input.Focus()
}

// typed is a key while a line is typed.
func (m *Model) typed(k tea.KeyPressMsg) tea.Cmd {
	was := m.mode
	switch k.String() {
	case "esc":
		m.mode = browsing
		if was == filtering {
			m.filter = ""
			m.refresh()
		}
		return nil
	case "enter":
		m.mode = browsing
		value, name := strings.TrimSpace(m.input.Value()), m.selected
		switch {
		case was == filtering || value == "":
		case was == balloon:
			return m.act(name+" shall have "+value, func(ctx context.Context) error { return m.cfg.Actions.Balloon(ctx, name, value) })
		case was == limiting:
			return m.act(name+" is limited to "+value, func(ctx context.Context) error { return m.cfg.Actions.Limits(ctx, name, value) })
		}
		return nil
	}
	var cmd tea.Cmd
	m.input, cmd = m.input.Update(k)
	if was == filtering {
		m.filter = m.input.Value()
		m.refresh()
	}
	return cmd
}

// row is the selected machine; nil if it has gone.
func (m *Model) row() *Row {
	for i := range m.shown {
		if m.shown[i].Name == m.selected {
			return &m.shown[i]
		}
	}
	return nil
}

// refresh sorts and filters again. The selection stays with its machine; if that is
// gone, with its place.
func (m *Model) refresh() {
	place := max(slices.IndexFunc(m.shown, func(r Row) bool { return r.Name == m.selected }), 0)
	m.shown = Select(m.snap.Machines, m.filter, m.sort, m.reverse)
	i := slices.IndexFunc(m.shown, func(r Row) bool { return r.Name == m.selected })
	if i < 0 {
		if m.mode == stopping || m.mode == balloon || m.mode == limiting {
			m.mode = browsing // and no other machine is meant
			m.message = m.selected + " has gone"
		}
		i = min(place, len(m.shown)-1)
		m.selected, m.details = "", m.details && i >= 0
		if i >= 0 {
			m.selected = m.shown[i].Name
		}
	}
	m.layout()
	m.table.SetCursor(max(i, 0))
}

// layout fits the columns into the window.
func (m *Model) layout() {
	left := m.width
	var cols []table.Column
	var fit []column
	for _, c := range columns {
		w := c.width
		if c.must || left >= w+1 {
			title := c.title
			if key(c.title) == m.sort {
				title += sortMark(m.reverse)
			}
			cols = append(cols, table.Column{Title: title, Width: w})
			fit = append(fit, c)
			left -= w + 1
		} else {
			break
		}
	}
	if n := len(cols); n > 0 && left > 0 {
		cols[n-1].Width += left
	}
	rows := make([]table.Row, len(m.shown))
	for i := range m.shown {
		for _, c := range fit {
			rows[i] = append(rows[i], c.text(&m.shown[i]))
		}
	}
	m.table.SetRows(nil) // rows have to be as wide as columns at any time
	m.table.SetColumns(cols)
	m.table.SetRows(rows)
	m.table.SetWidth(m.width)
	m.table.SetHeight(max(m.height-m.around(), 3))
}

func sortMark(reverse bool) string {
	if reverse {
		return "↑"
	}
	return "↓"
}

// around is how many lines are not the table's.
func (m *Model) around() int {
	n := 3 // head, message, keys
	if m.details {
		n += len(m.detailLines())
	}
	return n
}

const keys = "↑↓ select  enter details  </> sort  r reverse  / filter  s stop  p pause  b memory  l limits  x shell  ? help  q quit"

const help = `gondola top

  ↑ ↓ PgUp PgDn    select a machine            enter   its details
  < >              sort by another column      r       the other way
  /                filter by words: name, fleet, state, class
  s                stop the selected machine   p       pause it, or let it go on
  b                change its memory (balloon) l       limit its disks and networks
  x                a shell in its guest        q       quit

CPU and WAIT are in percent of a processor: used, and waited for while it wanted to
run. CLASS is the scheduler's judgement; with ? it was made here from the counters, as
no scheduler runs; ! is a time-critical machine. MEMORY is what it was configured
with, TARGET what the guest shall have, ACTUAL what it has, ACTIVE what it uses by
sampling (gondola manager), PSS what its process takes of the host, BALLOON what was
taken of the guest; … while the guest follows.

Any key goes back.`

// View implements tea.Model.
func (m *Model) View() tea.View {
	v := tea.NewView(m.text())
	v.AltScreen = true
	v.WindowTitle = "gondola top"
	return v
}

// text is what is on the screen.
func (m *Model) text() string {
	if m.quit {
		return ""
	}
	if m.mode == helping {
		return help
	}
	bold := lipgloss.NewStyle().Bold(true)
	head := fmt.Sprintf("gondola top  %s  %d machines", m.snap.Time.Format("15:04:05"), len(m.snap.Machines))
	if !m.looked {
		head = "gondola top  looking …"
	}
	if n := len(m.shown); m.filter != "" {
		head += fmt.Sprintf(", %d match %q", n, m.filter)
	}
	if m.snap.Host != "" {
		head += "  " + m.snap.Host
	}
	lines := []string{bold.Render(cut(head, m.width)), m.table.View()}
	if m.details {
		lines = append(lines, m.detailLines()...)
	}
	message := m.message
	switch {
	case m.mode == filtering || m.mode == balloon || m.mode == limiting:
		message = m.input.View()
	case m.mode == stopping:
		message = bold.Render("stop " + m.selected + "? y/n")
	case m.err != nil:
		message = bold.Render(cut(m.err.Error(), m.width))
	case message == "" && len(m.snap.Notes) > 0:
		message = cut(m.snap.Notes[0], m.width)
	case message == "" && m.looked && len(m.snap.Machines) == 0:
		message = "no machine runs: gondola run, or gondola fleet up"
	default:
		message = cut(message, m.width)
	}
	return strings.Join(append(lines, message, lipgloss.NewStyle().Faint(true).Render(cut(keys, m.width))), "\n")
}

// detailLines describe the selected machine.
func (m *Model) detailLines() []string {
	r := m.row()
	if r == nil {
		return nil
	}
	lines := []string{
		strings.Repeat("─", max(m.width, 1)),
		fmt.Sprintf("%s: %s, process %d, %d vCPUs, %s host, up %v, %d shares", r.Name, r.State, r.PID, r.VCPUs, r.Host, time.Duration(r.UpSecs)*time.Second, r.Shares),
		fmt.Sprintf("processor: %s %% used, %s %% waited, %s %% of it in the guest, %s exits/s", trim(100*r.CPU, 1), trim(100*r.Wait, 1), trim(100*r.Guest, 0), rate(r.Exits)),
		fmt.Sprintf("disk: %s/s in %s operations; network: %s/s in %s packets", size(r.Disk), rate(r.Ops), size(r.Net), rate(r.Pkts)),
		fmt.Sprintf("memory: %s configured, target %s, actual %s, %s of the host's behind it, PSS %s", size(float64(r.Memory)), size(float64(r.Target)),
			size(float64(r.Actual)), size(float64(r.Allocated)), size(float64(r.PSS))),
	}
	if r.Class != "" {
		lines = append(lines, fmt.Sprintf("class: %s by the %s, %s %% sure", r.Class, r.ClassBy, trim(100*r.Confidence, 0)))
	}
	if r.Decision != "" {
		at := ""
		if r.DecisionAt != nil {
			at = r.DecisionAt.Format(" at 15:04:05")
		}
		lines = append(lines, "last decision"+at+": "+r.Decision)
	}
	for _, d := range r.Devices {
		lines = append(lines, fmt.Sprintf("%s: %s %s, limits %s", d.Name, d.Kind, d.Detail, d.Limits))
	}
	if r.Problem != "" {
		lines = append(lines, r.Problem)
	}
	for i := range lines {
		lines[i] = cut(lines[i], m.width)
	}
	return lines[:min(len(lines), max(m.height-8, 1))]
}

// cut shortens s to a width in characters.
func cut(s string, width int) string {
	if r := []rune(s); len(r) > width && width > 0 {
		return string(r[:width-1]) + "…"
	}
	return s
}

// trim is a number with so many decimals.
func trim(v float64, decimals int) string { return strconv.FormatFloat(v, 'f', decimals, 64) }
