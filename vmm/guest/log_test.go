package guest

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/initconf"
)

// However the console's bytes are cut: what follows the line of the mark is passed on,
// its own empty lines included.
func TestLogAfterMark(t *testing.T) {
	const text = "kernel\r\n" + initconf.ConsoleMark + "\r\n\r\nfirst\r\nsecond\r\n"
	for n := 1; n <= len(text); n++ {
		var out bytes.Buffer
		var l consoleLog
		l.afterMark(&out)
		for rest := []byte(text); len(rest) > 0; {
			k := min(n, len(rest))
			_, err := l.Write(rest[:k])
			require.NoError(t, err)
			rest = rest[k:]
		}
		require.Equal(t, "\r\nfirst\r\nsecond\r\n", out.String(), "in pieces of %d", n)
		require.True(t, l.marked())
		require.Equal(t, text, string(l.bytes()))
	}
}

// A writer that takes nothing does not keep Close for ever.
func TestCloseBesideAWriterThatHangs(t *testing.T) {
	g := &Guest{done: make(chan struct{}), log: &consoleLog{}, printed: make(chan struct{})}
	require.NoError(t, g.Close())
}
