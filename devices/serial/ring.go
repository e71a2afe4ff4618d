package serial

// ring is a queue of bytes of a fixed size. The caller checks room and n.
type ring struct {
	buf  []byte
	head int
	n    int
}

func newRing(size int) ring { return ring{buf: make([]byte, size)} }

func (r *ring) room() int { return len(r.buf) - r.n }

func (r *ring) push(v byte) {
	i := r.head + r.n
	if i >= len(r.buf) {
		i -= len(r.buf)
	}
	r.buf[i] = v
	r.n++
}

func (r *ring) pop() byte {
	v := r.buf[r.head]
	r.skip(1)
	return v
}

// peek returns up to limit bytes from the front that lie in one piece. They stay
// what they are until skip.
func (r *ring) peek(limit int) []byte {
	return r.buf[r.head:min(r.head+min(limit, r.n), len(r.buf))]
}

func (r *ring) skip(n int) {
	r.head = (r.head + n) % len(r.buf)
	r.n -= n
}

func (r *ring) clear() { r.head, r.n = 0, 0 }

// bytes returns a copy of what is in the ring.
func (r *ring) bytes() []byte {
	b := make([]byte, 0, r.n)
	first := r.peek(r.n)
	return append(append(b, first...), r.buf[:r.n-len(first)]...)
}

// fill replaces what is in the ring.
func (r *ring) fill(p []byte) {
	r.head, r.n = 0, copy(r.buf, p)
}
