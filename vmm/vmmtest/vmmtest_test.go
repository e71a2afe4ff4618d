package vmmtest

import (
	"bufio"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/gondola-vmm/gondola/guestagent/initramfs"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/inguest"
)

type recorder struct{ logs, errors []string }

func (r *recorder) Log(args ...any)   { r.logs = append(r.logs, fmt.Sprint(args...)) }
func (r *recorder) Error(args ...any) { r.errors = append(r.errors, fmt.Sprint(args...)) }

// A function passes only if the guest says that it has come to its end.
func TestFollow(t *testing.T) {
	line := func(k inguest.Kind, name, text string) string {
		return inguest.Event{Kind: k, Func: name, Text: text}.String() + "\n"
	}
	begin, end := line(inguest.Begin, "f", ""), line(inguest.End, "f", "")
	for name, tc := range map[string]struct {
		out          string
		logs, errors []string
	}{
		"good":               {out: begin + line(inguest.Log, "f", "a") + "printed\n" + end, logs: []string{"a", "guest: printed"}},
		"failure":            {out: begin + line(inguest.Fail, "f", "1 != 2") + end, errors: []string{"1 != 2"}},
		"silence":            {out: "", errors: []string{"the function was not begun"}},
		"panic":              {out: begin + "panic: x", logs: []string{"guest: panic: x"}, errors: []string{"the program was silent before the function's end"}},
		"cut off in the end": {out: begin + strings.TrimSuffix(end, "\n"), logs: []string{"guest: " + strings.TrimSuffix(end, "\n")}, errors: []string{"the program was silent before the function's end"}},
		"another function":   {out: line(inguest.Begin, "g", ""), errors: []string{`unexpected event begin of function "g"`}},
		"begins twice":       {out: begin + begin, errors: []string{`unexpected event begin of function "f"`}},
		"done":               {out: begin + line(inguest.Done, "", ""), errors: []string{`unexpected event done of function ""`}},
	} {
		t.Run(name, func(t *testing.T) {
			var r recorder
			follow(&r, bufio.NewReader(strings.NewReader(tc.out)), "f")
			assert.Equal(t, tc.logs, r.logs)
			assert.Equal(t, tc.errors, r.errors)
		})
	}
}

func TestCommandLine(t *testing.T) {
	assert.Equal(t, "gondola run", commandLine(guest.Config{}))
	assert.Equal(t, `gondola run --kernel /k --cpus 2 --memory 256M --cmdline 'a b='\''c'\''' --userland busybox --console virtio --copy /x:/bin/y --rng`,
		commandLine(guest.Config{
			Kernel: "/k", VCPUs: 2, Memory: 256 << 20, Cmdline: "a b='c'", Userland: initramfs.UserlandBusybox,
			Console: guest.VirtioConsole, Files: []initramfs.File{{Host: "/x", Guest: "/bin/y"}}, RNG: true,
		}))
}
