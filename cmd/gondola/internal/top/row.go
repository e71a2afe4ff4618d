// Package top is the live view of gondola top: a table of machines that is sorted and
// filtered, with a machine to act on. It knows machines as rows only; where they come
// from and what acts on them is the caller's.
package top

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// Row is a machine at a moment. Rates are by second since the look before; they are
// there if Rated.
type Row struct {
	Name   string `json:"name"`
	Fleet  string `json:"fleet,omitempty"`
	State  string `json:"state"`
	PID    int    `json:"pid"`
	Host   string `json:"host,omitempty"`
	VCPUs  int    `json:"vcpus"`
	UpSecs int64  `json:"up_seconds"`

	Shares       uint64 `json:"shares"`
	TimeCritical bool   `json:"time_critical,omitempty"`

	Rated bool    `json:"rated"`
	CPU   float64 `json:"processors_used"`
	Wait  float64 `json:"processors_waited"`
	Guest float64 `json:"guest_fraction"` // of the processor time
	Exits float64 `json:"exits_per_second"`
	Disk  float64 `json:"disk_bytes_per_second"`
	Ops   float64 `json:"disk_operations_per_second"`
	Net   float64 `json:"net_bytes_per_second"`
	Pkts  float64 `json:"net_packets_per_second"`

	Class      string  `json:"class,omitempty"`
	Confidence float64 `json:"confidence,omitempty"`
	ClassBy    string  `json:"class_by,omitempty"` // scheduler, or counters: nobody schedules

	Memory    uint64 `json:"memory_bytes"` // configured
	Balloon   bool   `json:"balloon"`
	Target    uint64 `json:"target_bytes,omitempty"`
	Actual    uint64 `json:"actual_bytes,omitempty"`
	Active    uint64 `json:"active_bytes,omitempty"`
	Sampled   bool   `json:"active_known"`
	Allocated uint64 `json:"allocated_bytes,omitempty"`
	PSS       uint64 `json:"pss_bytes"`
	Late      bool   `json:"balloon_late,omitempty"` // the guest does not follow

	Decision   string     `json:"last_decision,omitempty"`
	DecisionAt *time.Time `json:"last_decision_at,omitempty"`
	Problem    string     `json:"problem,omitempty"`
	Devices    []Device   `json:"devices,omitempty"`
}

// Device is a disk or a network of a machine.
type Device struct {
	Name   string `json:"name"`
	Kind   string `json:"kind"`
	Detail string `json:"detail,omitempty"`
	Limits string `json:"limits"`
}

// Snapshot is all machines at a moment.
type Snapshot struct {
	Time     time.Time `json:"time"`
	Machines []Row     `json:"machines"`
	// Host is what the host has and is doing, in a line.
	Host  string   `json:"host,omitempty"`
	Notes []string `json:"notes,omitempty"`
}

// column is a column of the table.
type column struct {
	title string
	width int
	// must: it is there however narrow the terminal is.
	must bool
	text func(*Row) string
	less func(a, b *Row) int // ascending; nil: by text
}

// rate is a number by second in few characters.
func rate(v float64) string {
	switch {
	case v <= 0:
		return "0"
	case v < 10:
		return trim(v, 1)
	}
	return count(v)
}

// count is a number with a decimal unit.
func count(v float64) string { return scaled(v, 1000) }

// size is a number of bytes with a binary unit.
func size(v float64) string { return scaled(v, 1024) }

func scaled(v float64, base float64) string {
	i := 0
	units := []string{"", "K", "M", "G", "T", "P"}
	for v >= base*0.9995 && i < len(units)-1 {
		v, i = v/base, i+1
	}
	if i > 0 && v < 9.95 {
		return trim(v, 1) + units[i]
	}
	return trim(v, 0) + units[i]
}

func (r *Row) rated(s string) string {
	if !r.Rated {
		return "-"
	}
	return s
}

func (r *Row) withBalloon(s string) string {
	if !r.Balloon {
		return "-"
	}
	return s
}

// ballooned is what the balloon has taken.
func (r *Row) ballooned() string {
	if !r.Balloon {
		return "none"
	}
	s := size(float64(r.Memory - min(r.Actual, r.Memory)))
	switch {
	case r.Late:
		s += " late"
	case r.Target != r.Actual:
		s += " …"
	}
	return s
}

func (r *Row) class() string {
	s := r.Class
	if s == "" {
		s = "-"
	} else if r.ClassBy != "scheduler" {
		s += "?"
	}
	if r.TimeCritical {
		s = "!" + s
	}
	return s
}

func byNumber(f func(*Row) float64) func(a, b *Row) int {
	return func(a, b *Row) int { return cmp.Compare(f(a), f(b)) }
}

// columns of the table, in the order in which they are shown; narrow terminals drop
// those behind.
var columns = []column{
	{title: "NAME", width: 14, must: true, text: func(r *Row) string { return r.Name }},
	{title: "STATE", width: 8, must: true, text: func(r *Row) string { return r.State }},
	{title: "CPU", width: 6, must: true, text: func(r *Row) string { return r.rated(trim(100*r.CPU, 1)) }, less: byNumber(func(r *Row) float64 { return r.CPU })},
	{title: "WAIT", width: 6, text: func(r *Row) string { return r.rated(trim(100*r.Wait, 1)) }, less: byNumber(func(r *Row) float64 { return r.Wait })},
	{title: "CLASS", width: 12, text: (*Row).class},
	{title: "EXITS/S", width: 7, text: func(r *Row) string { return r.rated(rate(r.Exits)) }, less: byNumber(func(r *Row) float64 { return r.Exits })},
	{title: "DISK/S", width: 6, text: func(r *Row) string { return r.rated(size(r.Disk)) }, less: byNumber(func(r *Row) float64 { return r.Disk })},
	{title: "NET/S", width: 6, text: func(r *Row) string { return r.rated(size(r.Net)) }, less: byNumber(func(r *Row) float64 { return r.Net })},
	{title: "PSS", width: 5, text: func(r *Row) string { return size(float64(r.PSS)) }, less: byNumber(func(r *Row) float64 { return float64(r.PSS) })},
	{title: "MEMORY", width: 6, text: func(r *Row) string { return size(float64(r.Memory)) }, less: byNumber(func(r *Row) float64 { return float64(r.Memory) })},
	{title: "TARGET", width: 6, text: func(r *Row) string { return r.withBalloon(size(float64(r.Target))) }, less: byNumber(func(r *Row) float64 { return float64(r.Target) })},
	{title: "ACTUAL", width: 6, text: func(r *Row) string { return r.withBalloon(size(float64(r.Actual))) }, less: byNumber(func(r *Row) float64 { return float64(r.Actual) })},
	{title: "ACTIVE", width: 6, text: func(r *Row) string {
		if !r.Sampled {
			return "-"
		}
		return size(float64(r.Active))
	}, less: byNumber(func(r *Row) float64 { return float64(r.Active) })},
	{title: "BALLOON", width: 9, text: (*Row).ballooned, less: byNumber(func(r *Row) float64 { return float64(r.Memory - min(r.Actual, r.Memory)) })},
	{title: "FLEET", width: 10, text: func(r *Row) string { return r.Fleet }},
	{title: "LAST DECISION", width: 40, text: (*Row).last},
}

// last is what happened to the machine last, or what is wrong with it.
func (r *Row) last() string {
	if r.Problem != "" {
		return r.Problem
	}
	return r.Decision
}

// SortKeys are the names by which rows can be sorted.
func SortKeys() []string {
	var keys []string
	for _, c := range columns {
		keys = append(keys, key(c.title))
	}
	return keys
}

func key(title string) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimSuffix(title, "/S")), " ", "-")
}

// columnOf is the index of a sort key; -1 if there is none.
func columnOf(k string) int {
	return slices.IndexFunc(columns, func(c column) bool { return key(c.title) == k })
}

// Select returns the rows that match a filter, sorted by a column: numbers with the
// largest first, text from a to z, the other way with reverse; equals by name. A
// filter is words that all have to be in a row's name, fleet, state, class or host.
func Select(rows []Row, filter, sortKey string, reverse bool) []Row {
	words := strings.Fields(strings.ToLower(filter))
	out := slices.DeleteFunc(slices.Clone(rows), func(r Row) bool {
		text := strings.ToLower(strings.Join([]string{r.Name, r.Fleet, r.State, r.class(), r.Host}, "\x00"))
		return slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(text, w) })
	})
	i := columnOf(sortKey)
	if i < 0 {
		i = 0
	}
	c := columns[i]
	slices.SortStableFunc(out, func(a, b Row) int {
		d := 0
		if c.less != nil {
			d = c.less(&b, &a)
		} else {
			d = strings.Compare(c.text(&a), c.text(&b))
		}
		if reverse {
			d = -d
		}
		return cmp.Or(d, strings.Compare(a.Name, b.Name))
	})
	return out
}

// Text is the table as text, a line each, with all columns.
func Text(rows []Row) []string {
	lines := make([]string, len(rows)+1)
	for _, c := range columns {
		width := len(c.title)
		cells := make([]string, len(rows))
		for i := range rows {
			cells[i] = c.text(&rows[i])
			if cells[i] == "" {
				cells[i] = "-"
			}
			width = max(width, len([]rune(cells[i])))
		}
		lines[0] += pad(c.title, width+2)
		for i, s := range cells {
			lines[i+1] += pad(s, width+2)
		}
	}
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return lines
}

func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(width-len([]rune(s)), 0))
}
