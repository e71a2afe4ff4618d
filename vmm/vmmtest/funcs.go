package vmmtest

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/inguest"
)

// Funcs runs functions of the shared guest's program (Setup.Program), in this
// order and all in one process, each as a subtest. A function that does not say
// that it has come to its end has failed, and so have those behind it.
func (g *Guest) Funcs(t *testing.T, names ...string) {
	t.Helper()
	r, w := io.Pipe()
	var stderr bytes.Buffer
	type result struct {
		status guestagent.ExitStatus
		err    error
	}
	ended := make(chan result, 1)
	ctx, cancel := context.WithCancel(g.Within(t))
	defer cancel()
	go func() {
		s, err := g.Agent().Exec(ctx, guestagent.Command{Args: append([]string{programPath}, names...), Stdout: w, Stderr: &stderr})
		if err != nil {
			err = fmt.Errorf("%w (%v)", err, context.Cause(ctx))
		}
		w.Close()
		ended <- result{s, err}
	}()
	done := report(t, bufio.NewReader(r), names)
	// What is left is not wanted, but the program must not wait for a reader.
	_, _ = io.Copy(io.Discard, r)
	res := <-ended
	switch {
	case res.err != nil:
		t.Errorf("the program: %v", res.err)
	case !done || res.status.Code != 0:
		t.Errorf("the program ended with code %d before it was done", res.status.Code)
	}
	if stderr.Len() > 0 {
		t.Logf("the program's standard error:\n%s", stderr.String())
	}
}

// report turns a program's events into subtests and returns whether it came to
// its end.
func report(t *testing.T, out *bufio.Reader, names []string) (done bool) {
	for _, name := range names {
		t.Run(name, func(t *testing.T) { follow(t, out, name) })
	}
	e, ok := nextEvent(t, out)
	return ok && e.Kind == inguest.Done
}

// reporter is the part of a testing.T that follow uses.
type reporter interface {
	Log(args ...any)
	Error(args ...any)
}

// nextEvent returns a program's next event, false at its end. What it prints
// otherwise is logged.
func nextEvent(t reporter, out *bufio.Reader) (inguest.Event, bool) {
	for {
		line, err := out.ReadString('\n')
		line = strings.TrimSuffix(line, "\n")
		if e, ok := inguest.ParseEvent(line); ok && err == nil {
			return e, true
		}
		if line != "" {
			t.Log("guest: " + line)
		}
		if err != nil {
			return inguest.Event{}, false
		}
	}
}

// follow reports one function, whose events come next.
func follow(t reporter, out *bufio.Reader, name string) {
	for first := true; ; first = false {
		e, ok := nextEvent(t, out)
		switch {
		case !ok && first:
			t.Error("the function was not begun")
			return
		case !ok:
			t.Error("the program was silent before the function's end")
			return
		case e.Func != name || first != (e.Kind == inguest.Begin):
			t.Error(fmt.Sprintf("unexpected event %s of function %q", e.Kind, e.Func))
			return
		case e.Kind == inguest.Log:
			t.Log(e.Text)
		case e.Kind == inguest.Fail:
			t.Error(e.Text)
		case e.Kind == inguest.End:
			return
		}
	}
}
