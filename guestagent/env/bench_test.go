//go:build linux && amd64

package env

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// where is a way to run a program: on the base, on an overlay mount of the same
// tree, in an environment, under proot.
type where struct {
	name, tree string
	command    []string
}

// benchWorld is a tree with a directory of a thousand files, and the ways to it.
func benchWorld(b *testing.B) (dir, prog string, all []where) {
	dir, err := os.MkdirTemp(".", ".test-") // not below /tmp, which is every environment's own
	require.NoError(b, err)
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	dir, err = filepath.Abs(dir)
	require.NoError(b, err)
	prog = filepath.Join(dir, "helper")
	exe, err := os.ReadFile(program(b))
	require.NoError(b, err)
	require.NoError(b, os.WriteFile(prog, exe, 0o755))
	tree := filepath.Join(dir, "tree")
	require.NoError(b, os.MkdirAll(filepath.Join(tree, "a/b/many"), 0o755))
	for i := range 1000 {
		require.NoError(b, os.WriteFile(filepath.Join(tree, "a/b/many", fmt.Sprint(i)), []byte("text"), 0o644))
	}
	store := Store{filepath.Join(dir, "envs")}
	_, err = store.Create("bench", "", nil)
	require.NoError(b, err)
	b.Setenv(StoreVariable, store.Dir)
	over := filepath.Join(dir, "over")
	for _, d := range []string{over, dir + "/up", dir + "/work"} {
		require.NoError(b, os.Mkdir(d, 0o755))
	}
	require.NoError(b, unix.Mount("overlay", over, "overlay", 0, "lowerdir="+tree+",upperdir="+dir+"/up,workdir="+dir+"/work"), "root is needed")
	b.Cleanup(func() { _ = unix.Unmount(over, unix.MNT_DETACH) })
	_, err = exec.LookPath("proot")
	require.NoError(b, err, "this benchmark needs Debian's package proot")
	return dir, prog, []where{
		{"base", tree, nil},
		{"overlay", over, nil},
		{"env", tree, []string{prog, "run", "--dir", "/", "bench", "--"}},
		{"proot", tree, []string{"proot", "-b", tree + ":/mnt"}},
	}
}

// measured runs a command and gives what it says and the processor time of all that
// it took, in seconds.
func measured(b *testing.B, dir string, args ...string) (out string, cpu float64) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	text, err := cmd.CombinedOutput()
	require.NoError(b, err, string(text))
	return string(text), (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// BenchmarkEnv measures calls everywhere, in turn, so that the ways meet the same
// load; each number is the median of the rounds. of-proot is what a call costs more
// than on the base, of what it does under proot; cpu is the processor time of the
// program and all that serves it.
func BenchmarkEnv(b *testing.B) {
	const rounds = 7
	dir, prog, all := benchWorld(b)
	for _, what := range []struct {
		name string
		n    int // calls in a round
	}{{"stat", 6000}, {"open", 6000}, {"readdir", 300}, {"execve", 40}, {"read", 20000}} {
		b.Run(what.name, func(b *testing.B) {
			wall, cpu := map[string][]float64{}, map[string][]float64{}
			for range rounds {
				for _, w := range all {
					run := func(n int) (float64, float64) {
						out, cpu := measured(b, dir, append(slices.Clone(w.command), prog, "helper", "bench", what.name, w.tree, fmt.Sprint(n))...)
						ns, err := strconv.ParseFloat(strings.TrimSpace(out), 64)
						require.NoError(b, err, out)
						return ns / 1000, cpu
					}
					_, start := run(1)
					us, all := run(what.n)
					wall[w.name] = append(wall[w.name], us)
					cpu[w.name] = append(cpu[w.name], (all-start)/float64(what.n)*1e6)
				}
			}
			of := func(m map[string][]float64) float64 {
				return (median(m["env"]) - median(m["base"])) / (median(m["proot"]) - median(m["base"]))
			}
			for _, w := range all {
				b.ReportMetric(median(wall[w.name]), w.name+"-µs")
				b.ReportMetric(median(cpu[w.name]), w.name+"-cpu-µs")
			}
			b.ReportMetric(of(wall), "of-proot")
			b.ReportMetric(of(cpu), "of-proot-cpu")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkBuild measures real builds, with nothing built before: a C program of
// twelve files, and hello world in Go with the part of the standard library that it
// needs.
func BenchmarkBuild(b *testing.B) {
	dir, _, all := benchWorld(b)
	src := filepath.Join(dir, "src")
	require.NoError(b, os.Mkdir(src, 0o755))
	write := func(name, text string) {
		require.NoError(b, os.WriteFile(filepath.Join(src, name), []byte(text), 0o644))
	}
	var calls, decls strings.Builder
	for i := range 12 {
		fmt.Fprintf(&decls, "int part%d(int);\n", i)
		fmt.Fprintf(&calls, "n += part%d(n);\n", i)
		write(fmt.Sprintf("part%d.c", i), fmt.Sprintf("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <unistd.h>\n#include <math.h>\n#include <sys/socket.h>\n#include \"all.h\"\nint part%d(int n) { char b[100]; snprintf(b, sizeof b, \"%%d\", n); return strlen(b) + %d; }\n", i, i))
	}
	write("all.h", decls.String())
	write("main.c", "#include <stdio.h>\n#include \"all.h\"\nint main(void) { int n = 1; "+calls.String()+" printf(\"%d\\n\", n); return 0; }\n")
	write("hello.go", "package main\n\nimport \"fmt\"\n\nfunc main() { fmt.Println(\"hello\") }\n")
	write("go.mod", "module hello\n\ngo 1.21\n")
	for _, what := range []struct{ name, script, want string }{
		{"c", "for f in *.c; do gcc -O1 -c $f || exit; done; gcc -o prog *.o && ./prog; rm -f *.o prog", "87\n"},
		{"go", "GOFLAGS= GOCACHE=$PWD/cache go build -o hello . && ./hello; rm -rf hello cache", "hello\n"},
	} {
		b.Run(what.name, func(b *testing.B) {
			for _, w := range all {
				if w.name == "overlay" {
					continue
				}
				command := slices.Clone(w.command)
				if w.name == "env" {
					command[3] = src
				}
				start := time.Now()
				out, cpu := measured(b, src, append(command, "sh", "-c", what.script)...)
				b.ReportMetric(time.Since(start).Seconds(), w.name+"-s")
				b.ReportMetric(cpu, w.name+"-cpu-s")
				require.Equal(b, what.want, out)
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkMemory measures the memory of a supervisor whose table has 100 000 entries.
func BenchmarkMemory(b *testing.B) {
	dir, prog, _ := benchWorld(b)
	for _, entries := range []int{0, 100_000} {
		b.Run(fmt.Sprint(entries), func(b *testing.B) {
			var text strings.Builder
			text.WriteString(DefaultTable[:strings.Index(DefaultTable, "fit:")])
			text.WriteString("fit:\n  - /tmp\n")
			for i := range entries {
				fmt.Fprintf(&text, "  - /srv/area%d/project%d/file%d\n", i%100, i%1000, i)
			}
			text.WriteString(DefaultTable[strings.Index(DefaultTable, "rules:"):])
			name := fmt.Sprint("memory", entries)
			_, err := Store{filepath.Join(dir, "envs")}.Create(name, "", []byte(text.String()))
			require.NoError(b, err)
			cmd := exec.Command(prog, "run", "--dir", "/", name, "--", "sh", "-c", "cat /etc/passwd >/dev/null; echo; read x")
			out, err := cmd.StdoutPipe()
			require.NoError(b, err)
			in, err := cmd.StdinPipe()
			require.NoError(b, err)
			require.NoError(b, cmd.Start())
			_, err = bufio.NewReader(out).ReadString('\n')
			require.NoError(b, err)
			supervisor := supervisorOf(cmd.Process.Pid)
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", supervisor))
			require.NoError(b, err)
			_, after, _ := strings.Cut(string(status), "VmRSS:")
			var kib float64
			_, err = fmt.Sscan(after, &kib)
			require.NoError(b, err)
			_, _ = io.WriteString(in, "\n")
			require.NoError(b, cmd.Wait())
			b.ReportMetric(kib/1024, "MiB")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// bench performs calls and prints the nanoseconds of one.
func bench(what, tree string, n int) int {
	file := tree + "/a/b/many/500"
	fd, err := unix.Open(file, unix.O_RDONLY, 0)
	if err != nil {
		return 1
	}
	var st unix.Stat_t
	buf := make([]byte, 32<<10)
	start := time.Now()
	for range n {
		switch what {
		case "stat":
			err = unix.Stat(file, &st)
		case "open":
			var f int
			if f, err = unix.Open(file, unix.O_RDONLY, 0); err == nil {
				unix.Close(f)
			}
		case "readdir":
			var f int
			if f, err = unix.Open(tree+"/a/b/many", unix.O_RDONLY|unix.O_DIRECTORY, 0); err == nil {
				for m := 1; m > 0 && err == nil; {
					m, err = unix.Getdents(f, buf)
				}
				unix.Close(f)
			}
		case "execve":
			err = exec.Command("/bin/true").Run()
		case "read":
			_, err = unix.Pread(fd, buf[:4], 0)
		}
		if err != nil {
			fmt.Println(err)
			return 1
		}
	}
	fmt.Println(float64(time.Since(start).Nanoseconds()) / float64(n))
	return 0
}
