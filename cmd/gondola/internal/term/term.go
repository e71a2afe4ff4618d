// Package term is the user's terminal while it belongs to a guest: raw mode that
// is undone on every way out, the escape key, and the window's size.
package term

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/term"
)

// Escape is the key that introduces a command to gondola, Ctrl-a.
const Escape = 0x01

// Help is what Escape h prints.
const Help = "\r\n" +
	"gondola: Ctrl-a h  this help\r\n" +
	"         Ctrl-a x  end the machine\r\n" +
	"         Ctrl-a Ctrl-a  send Ctrl-a to the guest\r\n"

// ExecHelp is what Escape h prints where it is a command's terminal only.
const ExecHelp = "\r\n" +
	"gondola: Ctrl-a h  this help\r\n" +
	"         Ctrl-a x  end the command; the machine goes on\r\n" +
	"         Ctrl-a Ctrl-a  send Ctrl-a to the command\r\n"

// Raw puts f, if it is a terminal, into raw mode and returns what undoes it. The
// restore function is idempotent and must be deferred before anything can fail.
// For what is not a terminal both do nothing.
func Raw(f *os.File) (restore func(), err error) {
	fd := int(f.Fd())
	if !term.IsTerminal(fd) {
		return func() {}, nil
	}
	old, err := term.MakeRaw(fd)
	if err != nil {
		return func() {}, fmt.Errorf("terminal: %w", err)
	}
	var once sync.Once
	return func() { once.Do(func() { _ = term.Restore(fd, old) }) }, nil
}

// Size is f's window size in characters; ok is false if f is not a terminal.
func Size(f *os.File) (rows, cols uint16, ok bool) {
	c, r, err := term.GetSize(int(f.Fd()))
	if err != nil || r <= 0 || c <= 0 || r > 0xffff || c > 0xffff {
		return 0, 0, false
	}
	return uint16(r), uint16(c), true
}

// FollowSize calls resize with f's window size now and after each change, until
// ctx ends. For what is not a terminal it does nothing.
func FollowSize(ctx context.Context, f *os.File, resize func(rows, cols uint16)) {
	if !term.IsTerminal(int(f.Fd())) {
		return
	}
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGWINCH)
	go func() {
		defer signal.Stop(ch)
		for {
			if r, c, ok := Size(f); ok {
				resize(r, c)
			}
			select {
			case <-ctx.Done():
				return
			case <-ch:
			}
		}
	}()
}

// Input filters the escape key out of a terminal's input. Its Read returns
// io.EOF when the user types Escape x.
type Input struct {
	// Reader is the terminal.
	io.Reader
	// Out gets the help text.
	Out io.Writer
	// Help is the help text (default: that of a machine's terminal).
	Help string
	// Quit is called once when the user types Escape x.
	Quit func()

	escaped, quit bool
	buf           [1024]byte
}

// Read implements io.Reader.
func (i *Input) Read(p []byte) (int, error) {
	for {
		if i.quit {
			return 0, io.EOF
		}
		if len(p) == 0 {
			return 0, nil
		}
		n, err := i.Reader.Read(i.buf[:min(len(p), len(i.buf))])
		out := i.filter(p[:0], i.buf[:n])
		if len(out) > 0 || err != nil || i.quit {
			if i.quit {
				i.Quit()
				err = io.EOF
			}
			return len(out), err
		}
	}
}

// filter appends what of in is for the guest to out.
func (i *Input) filter(out, in []byte) []byte {
	for _, b := range in {
		switch {
		case !i.escaped && b == Escape:
			i.escaped = true
		case !i.escaped:
			out = append(out, b)
		default:
			i.escaped = false
			switch b {
			case Escape:
				out = append(out, b)
			case 'x', 'X':
				i.quit = true
				return out
			case 'h', 'H', '?':
				_, _ = io.WriteString(i.Out, cmp.Or(i.Help, Help))
			default:
				out = append(out, Escape, b)
			}
		}
	}
	return out
}
