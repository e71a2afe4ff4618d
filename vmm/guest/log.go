package guest

import (
	"bytes"
	"io"
	"strings"
	"sync"

	"github.com/gondola-vmm/gondola/guestagent/initconf"
)

// logSize is how much of a console is kept.
const logSize = 64 << 10

// consoleLog keeps the end of what the guest wrote to its serial port, and passes
// it on: all of it, or what comes after the init's word that it runs a command on
// the console.
type consoleLog struct {
	mu   sync.Mutex
	buf  []byte
	live io.Writer // gets everything as it comes; may be nil
	out  io.Writer
	wait bool // for the mark
	seen bool
	line bool // the mark was seen, the end of its line was not
}

// all passes everything on to w.
func (l *consoleLog) all(w io.Writer) { l.out = w }

// afterMark passes on to w what follows the init's mark.
func (l *consoleLog) afterMark(w io.Writer) { l.out, l.wait = w, true }

// Write implements io.Writer. It is called by one goroutine.
func (l *consoleLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	l.buf = append(l.buf, p...)
	if n := len(l.buf) - logSize; n > 0 && len(l.buf) > 2*logSize {
		l.buf = append(l.buf[:0], l.buf[n:]...)
	}
	pass := p
	if l.wait {
		pass = nil
		mark := []byte(initconf.ConsoleMark)
		// The mark may have come in pieces, the last of them now.
		from := max(0, len(l.buf)-len(p)-len(mark))
		if i := bytes.Index(l.buf[from:], mark); i >= 0 {
			l.wait, l.seen, l.line = false, true, true
			pass = bytes.Clone(l.buf[from+i+len(mark):])
		}
	}
	if l.line && len(pass) > 0 {
		pass = bytes.TrimLeft(pass, "\r")
		if len(pass) > 0 {
			l.line = false
			pass = bytes.TrimPrefix(pass, []byte("\n"))
		}
	}
	l.mu.Unlock()
	if l.live != nil {
		if _, err := l.live.Write(p); err != nil {
			return 0, err
		}
	}
	if l.out != nil && len(pass) > 0 {
		if _, err := l.out.Write(pass); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

func (l *consoleLog) marked() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seen
}

func (l *consoleLog) bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.buf[max(0, len(l.buf)-logSize):])
}

// excerpt is the log's last lines for an error message, "" if there are none.
func (l *consoleLog) excerpt() string {
	s := strings.TrimSpace(strings.ReplaceAll(string(l.bytes()), "\r", ""))
	if s == "" {
		return "; the guest wrote nothing to its console"
	}
	lines := strings.Split(s, "\n")
	if n := len(lines) - 20; n > 0 {
		lines = lines[n:]
	}
	return "; the end of its console:\n  " + strings.Join(lines, "\n  ")
}
