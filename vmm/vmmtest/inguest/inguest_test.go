package inguest

import (
	"bytes"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestProgramReports(t *testing.T) {
	p := Program{Funcs: map[string]func(*T){
		"good":   func(t *T) { t.Logf("line 1\nline 2") },
		"errors": func(t *T) { t.Errorf("%d wrong", 1); Equal(t, 1, 2, "sum") },
		"fatal":  func(t *T) { t.NoErr(assert.AnError, "open"); t.Logf("not reached") },
	}}
	var b bytes.Buffer
	p.run(&b, []string{"good", "errors", "fatal", "unknown"})
	var got []Event
	for line := range strings.Lines(b.String()) {
		e, ok := ParseEvent(strings.TrimSuffix(line, "\n"))
		require.True(t, ok, "%q", line)
		if _, text, ok := strings.Cut(e.Text, ".go:"); ok {
			_, e.Text, _ = strings.Cut(text, ": ") // without the line's number
		}
		got = append(got, e)
	}
	assert.Equal(t, []Event{
		{Begin, "good", ""}, {Log, "good", "line 1\nline 2"}, {End, "good", ""},
		{Begin, "errors", ""}, {Fail, "errors", "1 wrong"}, {Fail, "errors", "sum: want 1, got 2"}, {End, "errors", ""},
		{Begin, "fatal", ""}, {Fail, "fatal", "open: " + assert.AnError.Error()}, {End, "fatal", ""},
		{Begin, "unknown", ""}, {Fail, "unknown", `the program has no function "unknown"`}, {End, "unknown", ""},
		{Done, "", ""},
	}, got)
}

func FuzzParseEvent(f *testing.F) {
	for _, s := range []string{"", mark, mark + "log", Event{Fail, "a b", "c\n\"d\x00"}.String(), mark + `log "a"`, mark + `log "a" "b" `} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		e, ok := ParseEvent(line)
		if !ok {
			return
		}
		again, ok := ParseEvent(e.String())
		require.True(t, ok)
		assert.Equal(t, e, again)
	})
}
