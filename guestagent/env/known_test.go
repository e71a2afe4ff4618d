//go:build linux && amd64

package env

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// shell is a shell that runs in an environment and does what it is told.
func (w *world) shell(e *Env) func(script string) string {
	cmd := w.command(e, "/bin/sh", "-c", `while read -r line; do eval "$line" 2>&1; echo "--- end"; done`)
	in, err := cmd.StdinPipe()
	require.NoError(w.t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(w.t, err)
	var said strings.Builder
	cmd.Stderr = &said
	require.NoError(w.t, cmd.Start())
	timer := time.AfterFunc(100*time.Second, func() { _ = cmd.Process.Kill() })
	w.t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
		timer.Stop()
	})
	lines := bufio.NewReader(out)
	return func(script string) string {
		w.t.Helper()
		_, err := fmt.Fprintln(in, script)
		require.NoError(w.t, err)
		var all strings.Builder
		for {
			l, err := lines.ReadString('\n')
			if err != nil {
				_ = cmd.Wait()
			}
			require.NoError(w.t, err, "%s%s", &all, &said)
			if l == "--- end\n" {
				return all.String()
			}
			all.WriteString(l)
		}
	}
}

// TestKnownNames: what a supervisor keeps of names does not outlast their changes,
// whoever makes them: the program, another run, the base, somebody in the tree.
func TestKnownNames(t *testing.T) {
	w := newWorld(t)
	e := w.create("known", fmt.Sprintf("version: 1\nfet: [/]\nfit: [/tmp]\nrules: [{name: \"%s/conf/**\", refuse: EACCES}, {name: \"/dev/**\", pass: true}]\n", w.base))
	one, two := w.shell(e), w.shell(e)
	d := w.base + "/d"
	for range 3 { // the second time it is known
		assert.Equal(t, "x\ny\nz\n", one("cat "+d+"/x "+d+"/y "+d+"/deep/er/z"))
		assert.Equal(t, "deep x y er z\n", one("cd "+d+"; echo $(ls) $(ls deep) $(ls deep/er)"))
		assert.Contains(t, one("cat "+d+"/none "+d+"/deep/none"), "No such file")
		assert.Contains(t, one("stat -c %F "+w.base+"/link"), "symbolic link")
	}
	// Another run of the same environment.
	two("echo 2 > " + d + "/x; rm " + d + "/y; echo n > " + d + "/none; mkdir " + d + "/deep/none; echo up > " + d + "/deep/er/z")
	assert.Equal(t, "2\nn\nup\n", one("cat "+d+"/x "+d+"/none "+d+"/deep/er/z"))
	assert.Contains(t, one("cat "+d+"/y"), "No such file")
	assert.Equal(t, "deep none x er none z\n", one("cd "+d+"; echo $(ls) $(ls deep) $(ls deep/er)"))
	// A directory that is now the environment's alone, and known as such.
	two("rm -r " + d + "/deep; mkdir -p " + d + "/deep/er; echo own > " + d + "/deep/er/own")
	for range 2 {
		assert.Equal(t, "own\nown\n", one("ls "+d+"/deep/er; cat "+d+"/deep/er/own"))
		assert.Contains(t, one("cat "+d+"/deep/er/z"), "No such file")
	}
	two("rm -r " + d + "/deep; ln -s ../conf " + d + "/deep")
	assert.Contains(t, one("cat "+d+"/deep/app"), "Permission denied")
	// The base, whose changes are seen where the environment has nothing of its own.
	sub := filepath.Join(w.base, "sub/dir")
	require.NoError(t, os.MkdirAll(sub, 0o755))
	require.NoError(t, os.WriteFile(sub+"/f", []byte("f\n"), 0o644))
	for range 2 {
		assert.Equal(t, "f\nf\n", one("cat "+sub+"/f; ls "+sub))
	}
	require.NoError(t, os.WriteFile(sub+"/g", []byte("g\n"), 0o644))
	assert.Equal(t, "g\n", one("cat "+sub+"/g"))
	assert.Equal(t, "f\ng\n", one("ls "+sub))
	require.NoError(t, os.Remove(sub+"/f"))
	assert.Contains(t, one("cat "+sub+"/f"), "No such file")
	require.NoError(t, os.RemoveAll(sub))
	assert.Contains(t, one("cat "+sub+"/g"), "No such file")
	require.NoError(t, os.Symlink(w.base+"/conf", sub)) // where nothing may be seen
	for range 2 {
		assert.Contains(t, one("cat "+sub+"/app; ls -l "+sub+"/app"), "Permission denied")
	}
	require.NoError(t, os.Remove(sub))
	require.NoError(t, os.WriteFile(sub, []byte("file\n"), 0o644))
	assert.Equal(t, "file\n", one("cat "+sub))
	assert.Contains(t, one("cat "+sub+"/app"), "Not a directory")
	require.NoError(t, os.RemoveAll(w.base+"/sub"))
	// Somebody puts something into the tree by hand: it is seen in time.
	assert.Equal(t, "b\n", one("cat "+w.base+"/b"))
	require.NoError(t, os.WriteFile(filepath.Join(e.Dir, "root", w.base, "b"), []byte("by hand\n"), 0o644))
	assert.Eventually(t, func() bool { return one("cat "+w.base+"/b") == "by hand\n" }, 20*time.Second, 50*time.Millisecond)
	w.sum = hashTree(t, w.base) // the test itself has changed times
}

// TestStartTogether: several runs of an environment that start at once.
func TestStartTogether(t *testing.T) {
	w := newWorld(t)
	e := w.create("together", "")
	for range 5 {
		var runs []*exec.Cmd
		var said [6]strings.Builder
		for i := range said {
			cmd := w.command(e, "/bin/sh", "-c", "echo ok")
			cmd.Stdout, cmd.Stderr = &said[i], &said[i]
			require.NoError(t, cmd.Start())
			runs = append(runs, cmd)
		}
		for i, cmd := range runs {
			assert.NoError(t, cmd.Wait())
			assert.Equal(t, "ok\n", said[i].String())
		}
	}
}
