package guestkernel

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestOutput(t *testing.T) {
	var events []Event
	o := &output{emit: func(e Event) { events = append(events, e) }}
	text := "@unpack\ntar: @unpack 66500\ntar: a remark\n@configure\n  HOSTCC  scripts/kconfig/conf.o\n@compile\n" +
		"  CC      init/main.o\n  CC [M]  three words.o\nfork.c: warning: unused\n  LD      .tmp_vmlinux.kallsyms1\n  CC      arch/x86/boot/a20.o\n@store\n"
	// Pieces need not be lines.
	for i := 0; i < len(text); i += 7 {
		n, err := o.Write([]byte(text[i:min(i+7, len(text))]))
		require.NoError(t, err)
		require.Equal(t, min(7, len(text)-i), n)
	}
	assert.Equal(t, []Event{
		{PhaseUnpack, 0, ""},
		{PhaseUnpack, 50, ""},
		{PhaseConfigure, -1, ""},
		{PhaseCompile, -1, ""},
		{PhaseCompile, 0, "init/main.o"},
		{PhaseLink, -1, ".tmp_vmlinux.kallsyms1"},
		{PhaseLink, -1, "arch/x86/boot/a20.o"},
		{PhaseStore, -1, ""},
	}, events)
	assert.Contains(t, o.tail, "fork.c: warning: unused")
}

func TestOutputKeepsLittle(t *testing.T) {
	o := &output{emit: func(Event) {}}
	for i := range 1000 {
		fmt.Fprintf(o, "line %d %s\n", i, strings.Repeat("x", 5000))
	}
	require.Len(t, o.tail, tailLines)
	assert.True(t, strings.HasPrefix(o.tail[tailLines-1], "line 999 "))
	assert.Len(t, o.tail[0], maxLine)
}

func TestEventString(t *testing.T) {
	assert.Equal(t, "compiling the guest kernel 42% (kernel/fork.o)", Event{PhaseCompile, 42, "kernel/fork.o"}.String())
	assert.Equal(t, "unpacking the Linux source", Event{Phase: PhaseUnpack, Percent: -1}.String())
	for _, p := range []Phase{PhaseWait, PhaseInstall, PhaseUnpack, PhaseConfigure, PhaseCompile, PhaseLink, PhaseStore} {
		assert.NotEmpty(t, phaseText[p])
	}
}

func FuzzOutput(f *testing.F) {
	f.Add([]byte("@unpack 12\n@compile\n  CC      a.o\n  LD vmlinux\n"))
	f.Add([]byte("@\n@unpack -99999999999999999999\n@unpack 9223372036854775807\n"))
	f.Add([]byte(strings.Repeat("x", 3*maxLine)))
	f.Fuzz(func(t *testing.T, p []byte) {
		o := &output{emit: func(e Event) {
			if e.Percent < -1 || e.Percent > 100 {
				t.Fatalf("%+v", e)
			}
		}}
		n, err := o.Write(p)
		if n != len(p) || err != nil || len(o.tail) > tailLines || len(o.line) > maxLine {
			t.Fatal(n, err, len(o.tail), len(o.line))
		}
	})
}
