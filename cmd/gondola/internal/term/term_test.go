package term

import (
	"bytes"
	"context"
	"io"
	"os"
	"testing"
	"testing/iotest"

	"github.com/creack/pty"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	xterm "golang.org/x/term"
)

func TestInput(t *testing.T) {
	for _, tc := range []struct {
		name, in, out string
		quit, help    bool
	}{
		{"plain", "ls\r", "ls\r", false, false},
		{"quit", "ls\x01xrm", "ls", true, false},
		{"help", "a\x01hb", "ab", false, true},
		{"escape itself", "a\x01\x01b", "a\x01b", false, false},
		{"unknown key goes through", "\x01q", "\x01q", false, false},
		{"escape at the end", "a\x01", "a", false, false},
	} {
		for name, wrap := range map[string]func(io.Reader) io.Reader{
			"whole": func(r io.Reader) io.Reader { return r }, "byte by byte": iotest.OneByteReader,
		} {
			t.Run(tc.name+"/"+name, func(t *testing.T) {
				var help bytes.Buffer
				quit := 0
				in := &Input{Reader: wrap(bytes.NewBufferString(tc.in)), Out: &help, Quit: func() { quit++ }}
				out, err := io.ReadAll(in)
				require.NoError(t, err)
				assert.Equal(t, tc.out, string(out))
				assert.Equal(t, tc.quit, quit == 1)
				assert.Equal(t, tc.help, help.String() == Help)
			})
		}
	}
}

func TestRawIsRestored(t *testing.T) {
	m, s, err := pty.Open()
	require.NoError(t, err)
	defer m.Close()
	defer s.Close()
	before, err := xterm.GetState(int(s.Fd()))
	require.NoError(t, err)
	restore, err := Raw(s)
	require.NoError(t, err)
	raw, err := xterm.GetState(int(s.Fd()))
	require.NoError(t, err)
	assert.NotEqual(t, before, raw)
	restore()
	restore()
	after, err := xterm.GetState(int(s.Fd()))
	require.NoError(t, err)
	assert.Equal(t, before, after)
}

func TestNotATerminal(t *testing.T) {
	f, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer f.Close()
	restore, err := Raw(f)
	require.NoError(t, err)
	restore()
	_, _, ok := Size(f)
	assert.False(t, ok)
	FollowSize(context.Background(), f, func(uint16, uint16) { t.Error("a file has no window") })
}

func TestFollowSize(t *testing.T) {
	m, s, err := pty.Open()
	require.NoError(t, err)
	defer m.Close()
	defer s.Close()
	require.NoError(t, pty.Setsize(s, &pty.Winsize{Rows: 33, Cols: 77}))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	sizes := make(chan [2]uint16, 4)
	FollowSize(ctx, s, func(r, c uint16) { sizes <- [2]uint16{r, c} })
	assert.Equal(t, [2]uint16{33, 77}, <-sizes)
}
