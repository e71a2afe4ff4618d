// Package inguest is the guest's side of the test harness: a program made of
// named test functions, which vmmtest runs in a guest and reports as subtests on
// the host. It is small on purpose, because where guest kernels are emulated every
// MiB of a program costs a second.
package inguest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
)

// Kind of an event that a program reports.
type Kind string

// The events of a program: for each function Begin, then any number of Log and
// Fail, then End; after the last one Done. A program without Done has failed,
// whatever its exit code.
const (
	Begin Kind = "begin"
	Log   Kind = "log"
	Fail  Kind = "fail"
	End   Kind = "end"
	Done  Kind = "done"
)

// Event is one line of a program's standard output.
type Event struct {
	Kind Kind
	Func string // the function it is about; "" for Done
	Text string
}

// mark begins a line that is an event; other lines are what the program prints.
const mark = "\x1e"

// String is the event's line without its end.
func (e Event) String() string {
	return fmt.Sprintf("%s%s %s %s", mark, e.Kind, strconv.Quote(e.Func), strconv.Quote(e.Text))
}

// ParseEvent reads a line; false if it is no event.
func ParseEvent(line string) (Event, bool) {
	rest, ok := strings.CutPrefix(line, mark)
	kind, rest, ok2 := strings.Cut(rest, " ")
	if !ok || !ok2 {
		return Event{}, false
	}
	e := Event{Kind: Kind(kind)}
	for i, field := range []*string{&e.Func, &e.Text} {
		quoted, err := strconv.QuotedPrefix(rest)
		if err != nil {
			return Event{}, false
		}
		if *field, err = strconv.Unquote(quoted); err != nil {
			return Event{}, false
		}
		rest = rest[len(quoted):]
		if i == 0 {
			if rest, ok = strings.CutPrefix(rest, " "); !ok {
				return Event{}, false
			}
		}
	}
	return e, rest == ""
}

// T is what a function gets, much like a testing.T. Its methods may be called
// from any goroutine, except Fatalf and NoErr, which end the function's own.
type T struct {
	name string
	out  *output
}

type output struct {
	mu sync.Mutex
	w  io.Writer
}

func (o *output) send(e Event) {
	o.mu.Lock()
	defer o.mu.Unlock()
	// Whoever reads has gone if this fails, and then nobody is there to tell.
	_, _ = fmt.Fprintln(o.w, e)
}

// caller is "file.go:12: " of who called a method of T.
func caller() string {
	if _, file, line, ok := runtime.Caller(2); ok {
		return fmt.Sprintf("%s:%d: ", filepath.Base(file), line)
	}
	return ""
}

// Logf reports something worth knowing.
func (t *T) Logf(format string, args ...any) {
	t.out.send(Event{Log, t.name, caller() + fmt.Sprintf(format, args...)})
}

// Errorf reports a failure; the function goes on.
func (t *T) Errorf(format string, args ...any) {
	t.out.send(Event{Fail, t.name, caller() + fmt.Sprintf(format, args...)})
}

// Fatalf reports a failure and ends the function.
func (t *T) Fatalf(format string, args ...any) {
	t.out.send(Event{Fail, t.name, caller() + fmt.Sprintf(format, args...)})
	runtime.Goexit()
}

// NoErr ends the function if err is not nil; what says what was tried.
func (t *T) NoErr(err error, what string) {
	if err != nil {
		t.out.send(Event{Fail, t.name, fmt.Sprintf("%s%s: %v", caller(), what, err)})
		runtime.Goexit()
	}
}

// Equal reports a failure if two values differ.
func Equal[V comparable](t *T, want, got V, what string) {
	if want != got {
		t.out.send(Event{Fail, t.name, fmt.Sprintf("%s%s: want %v, got %v", caller(), what, want, got)})
	}
}

// Program is a program for guests.
type Program struct {
	// Funcs are the test functions by name.
	Funcs map[string]func(*T)
	// Children are what Child starts: each gets its arguments and returns its
	// exit code.
	Children map[string]func(args []string) int
}

const childFlag = "-child"

// Main runs the functions that the command line names, one after the other, and
// ends the program.
func (p Program) Main() {
	args := os.Args[1:]
	if len(args) >= 2 && args[0] == childFlag {
		f, ok := p.Children[args[1]]
		if !ok {
			fmt.Fprintf(os.Stderr, "no child %q\n", args[1])
			os.Exit(2)
		}
		os.Exit(f(args[2:]))
	}
	out := bufio.NewWriter(os.Stdout)
	p.run(flusher{out}, args)
}

// flusher makes each event one write.
type flusher struct{ *bufio.Writer }

func (f flusher) Write(p []byte) (int, error) {
	n, err := f.Writer.Write(p)
	if err == nil {
		err = f.Flush()
	}
	return n, err
}

func (p Program) run(w io.Writer, names []string) {
	out := &output{w: w}
	for _, name := range names {
		t := &T{name: name, out: out}
		out.send(Event{Kind: Begin, Func: name})
		f, ok := p.Funcs[name]
		if !ok {
			t.Errorf("the program has no function %q", name)
			f = func(*T) {}
		}
		// Its own goroutine, so that Fatalf can end it.
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			f(t)
		}()
		<-ended
		out.send(Event{Kind: End, Func: name})
	}
	out.send(Event{Kind: Done})
}

// Child returns the command that runs one of the program's Children in a process
// of its own.
func Child(name string, args ...string) *exec.Cmd {
	return exec.Command("/proc/self/exe", append([]string{childFlag, name}, args...)...)
}
