package control

import "sync"

// logSize is how much of a console a Log keeps, in bytes.
const logSize = 64 << 10

// Log keeps the end of a console's output for those who ask later, and lets any
// number of readers follow it. Writing never waits for them. The zero value
// works.
type Log struct {
	mu      sync.Mutex
	buf     []byte
	end     uint64        // bytes written since the beginning
	changed chan struct{} // closed at the next write, if somebody waits
}

// Write implements io.Writer; it never fails.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if n := len(l.buf) - logSize; n > 0 && len(l.buf) > 2*logSize {
		l.buf = append(l.buf[:0], l.buf[n:]...)
	}
	l.end += uint64(len(p))
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
	return len(p), nil
}

// read copies what there is from position pos on into p. It returns the position
// behind it, how many bytes in between are no longer there, and, if there is
// nothing, a channel that is closed when there may be.
func (l *Log) read(p []byte, pos uint64) (n int, next, lost uint64, more <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	have := uint64(min(len(l.buf), logSize))
	if first := l.end - have; pos < first {
		lost, pos = first-pos, first
	}
	n = copy(p, l.buf[uint64(len(l.buf))-(l.end-pos):])
	if n == 0 {
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		more = l.changed
	}
	return n, pos + uint64(n), lost, more
}
