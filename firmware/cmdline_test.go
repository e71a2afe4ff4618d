package firmware

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestParam(t *testing.T) {
	for _, tc := range []struct {
		key, value, want string
		err              error
	}{
		{"quiet", "", "quiet", nil},
		{"init", "/bin/sh", "init=/bin/sh", nil},
		{"dyndbg", "file a +p", `dyndbg="file a +p"`, nil},
		{"root", "UUID=x", "root=UUID=x", nil},
		{"", "x", "", ErrCmdline},
		{"a b", "x", "", ErrCmdline},
		{"a=b", "x", "", ErrCmdline},
		{"a", `x"y`, "", ErrCmdline},
		{"a", "x\x00y", "", ErrCmdline},
	} {
		got, err := Param(tc.key, tc.value)
		require.ErrorIs(t, err, tc.err)
		assert.Equal(t, tc.want, got)
	}
}

func TestCmdline(t *testing.T) {
	got, err := cmdline(" console=hvc0\n", windows(1), "\tconsole=ttyS0 -- sh ", 2047)
	require.NoError(t, err)
	assert.Equal(t, "console=hvc0 virtio_mmio.device=0x1000@0xd0000000:5 console=ttyS0 -- sh", got)

	got, err = cmdline("", nil, "", 0)
	require.NoError(t, err)
	assert.Empty(t, got)

	for n, want := range map[int]error{100: nil, 101: ErrCmdlineTooLong} {
		_, err = cmdline("a", nil, strings.Repeat("x", n-2), 100)
		require.ErrorIs(t, err, want)
	}
	_, err = cmdline("a", nil, `b="c`, 100)
	require.ErrorIs(t, err, ErrCmdline)
}

// The kernel takes the line apart again as it was put together: no part can
// end early or swallow the next one.
func FuzzCmdline(f *testing.F) {
	f.Add("console=ttyS0", "quiet")
	f.Add(`a="b c"`, "-- sh")
	f.Add("\x00", "\"")
	f.Add("", strings.Repeat("x", 3000))
	f.Fuzz(func(t *testing.T, machine, user string) {
		s, err := cmdline(machine, windows(1), user, linuxCmdlineMax)
		if err != nil {
			return
		}
		require.LessOrEqual(t, len(s), linuxCmdlineMax)
		require.NotContains(t, s, "\x00")
		device := " " + windows(1)[0].Param() + " "
		at := strings.Index(" "+s+" ", device)
		require.GreaterOrEqual(t, at, 0)
		require.Zero(t, strings.Count(machine, `"`)%2)
		if p, err := Param(user, machine); err == nil {
			require.Equal(t, strings.ContainsAny(machine, " \t\n\v\f\r"), strings.HasSuffix(p, `"`))
		}
	})
}
