package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/vmm/vmmtest/inguest"
)

// goroutines: a pipeline of sieves finds primes, and many goroutines share a
// counter.
func goroutines(t *inguest.T) {
	all, stop := make(chan int), make(chan struct{})
	numbers := all
	go func() {
		for i := 2; ; i++ {
			select {
			case all <- i:
			case <-stop:
				return
			}
		}
	}()
	sum := 0
	for range 50 {
		prime := <-numbers
		sum += prime
		in, out := numbers, make(chan int)
		go func() {
			for {
				select {
				case n := <-in:
					if n%prime == 0 {
						continue
					}
					select {
					case out <- n:
					case <-stop:
						return
					}
				case <-stop:
					return
				}
			}
		}()
		numbers = out
	}
	close(stop)
	inguest.Equal(t, 5117, sum, "sum of the first 50 primes")

	var mu sync.Mutex
	var wg sync.WaitGroup
	var locked int
	var counted atomic.Int64
	for range 100 {
		wg.Go(func() {
			for range 100 {
				mu.Lock()
				locked++
				mu.Unlock()
				counted.Add(1)
			}
		})
	}
	wg.Wait()
	inguest.Equal(t, 10000, locked, "additions under a lock")
	inguest.Equal(t, 10000, counted.Load(), "atomic additions")
}

// timers fire in order and not early; a stopped one does not fire.
func timers(t *inguest.T) {
	begin := time.Now()
	var order []int
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, ms := range []int{300, 100, 200} {
		wg.Add(1)
		time.AfterFunc(time.Duration(ms)*time.Millisecond, func() {
			defer wg.Done()
			mu.Lock()
			defer mu.Unlock()
			order = append(order, ms)
			if d := time.Since(begin); d < time.Duration(ms)*time.Millisecond {
				t.Errorf("the timer of %d ms fired after %v", ms, d)
			}
		})
	}
	stopped := time.AfterFunc(time.Hour, func() { t.Errorf("the stopped timer fired") })
	if !stopped.Stop() {
		t.Errorf("stopping a timer that has not fired")
	}
	wg.Wait()
	inguest.Equal(t, "[100 200 300]", fmt.Sprint(order), "order of the timers")

	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	last := time.Now()
	for range 4 {
		now := <-tick.C
		if now.Before(last) {
			t.Errorf("tick at %v after one at %v", now, last)
		}
		last = now
	}
	select {
	case <-time.After(20 * time.Millisecond):
	case <-make(chan int):
	}
}

// files are written, read, renamed, truncated, mapped and removed.
func files(t *inguest.T) {
	dir, err := os.MkdirTemp("", "files")
	t.NoErr(err, "temporary directory")
	defer os.RemoveAll(dir)
	name := filepath.Join(dir, "a")
	content := make([]byte, 100<<10)
	for i := range content {
		content[i] = byte(i * i >> 3)
	}
	t.NoErr(os.WriteFile(name, content, 0o640), "write")
	t.NoErr(os.Rename(name, name+"b"), "rename")
	got, err := os.ReadFile(name + "b")
	t.NoErr(err, "read")
	inguest.Equal(t, true, bytes.Equal(content, got), "content of the file")
	if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the renamed file is still there: %v", err)
	}
	f, err := os.OpenFile(name+"b", os.O_RDWR, 0)
	t.NoErr(err, "open")
	defer f.Close()
	m, err := syscall.Mmap(int(f.Fd()), 0, len(content), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	t.NoErr(err, "mmap")
	inguest.Equal(t, true, bytes.Equal(content, m), "content of the mapping")
	copy(m[5000:], "through the mapping")
	var back [19]byte
	_, err = f.ReadAt(back[:], 5000)
	t.NoErr(err, "read at")
	inguest.Equal(t, "through the mapping", string(back[:]), "what the mapping wrote")
	t.NoErr(syscall.Munmap(m), "munmap")
	t.NoErr(f.Truncate(10), "truncate")
	fi, err := f.Stat()
	t.NoErr(err, "stat")
	inguest.Equal(t, int64(10), fi.Size(), "size after truncation")
	t.NoErr(os.Symlink("ab", filepath.Join(dir, "link")), "symlink")
	es, err := os.ReadDir(dir)
	t.NoErr(err, "read directory")
	inguest.Equal(t, 2, len(es), "directory entries")
}

// pipes carry more than they hold, and tell of both ends' closing.
func pipes(t *inguest.T) {
	r, w, err := os.Pipe()
	t.NoErr(err, "pipe")
	const size = 256 << 10
	go func() {
		defer w.Close()
		if _, err := w.Write(bytes.Repeat([]byte("0123456789abcdef"), size/16)); err != nil {
			t.Errorf("write: %v", err)
		}
	}()
	got, err := io.ReadAll(r)
	t.NoErr(err, "read")
	inguest.Equal(t, size, len(got), "bytes through the pipe")
	inguest.Equal(t, size/16, bytes.Count(got, []byte("0123456789abcdef")), "patterns through the pipe")
	r.Close()

	r, w, err = os.Pipe()
	t.NoErr(err, "pipe")
	r.Close()
	if _, err := w.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write without a reader: %v", err)
	}
	w.Close()
}

func tcp(t *inguest.T) { serve(t, "tcp", "127.0.0.1:0") }

func unixSockets(t *inguest.T) {
	dir, err := os.MkdirTemp("", "unix")
	t.NoErr(err, "temporary directory")
	defer os.RemoveAll(dir)
	serve(t, "unix", filepath.Join(dir, "s"))
	serve(t, "unix", "@abstract")
}

// serve has four clients talk with an upper-casing server at once.
func serve(t *inguest.T, network, address string) {
	l, err := net.Listen(network, address)
	t.NoErr(err, "listen")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, err := io.ReadAll(c)
				if err == nil {
					_, err = c.Write(bytes.ToUpper(b))
				}
				if err != nil {
					t.Errorf("%s server: %v", network, err)
				}
			}()
		}
	}()
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			c, err := net.Dial(network, l.Addr().String())
			if err != nil {
				t.Errorf("dial: %v", err)
				return
			}
			defer c.Close()
			text := strings.Repeat(fmt.Sprintf("client %d;", i), 4000)
			if _, err := io.WriteString(c, text); err != nil {
				t.Errorf("%s client: %v", network, err)
			}
			if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Errorf("%s client: %v", network, err)
			}
			got, err := io.ReadAll(c)
			if err != nil || string(got) != strings.ToUpper(text) {
				t.Errorf("%s client %d got %d bytes of %d: %v", network, i, len(got), len(text), err)
			}
		})
	}
	wg.Wait()
	l.Close()
	if _, err := net.DialTimeout(network, l.Addr().String(), time.Second); err == nil {
		t.Errorf("%s: a connection to a closed listener", network)
	}
}

// children: a Go child and shell children, their codes, output and signals.
func children(t *inguest.T) {
	c := inguest.Child("echo", "7")
	c.Stdin = strings.NewReader("to the child")
	var stderr bytes.Buffer
	c.Stderr = &stderr
	c.Env = append(os.Environ(), "GREETING=hello")
	out, err := c.Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("the child's end: %v", err)
	}
	inguest.Equal(t, "hello to the child", string(out), "the child's output")
	inguest.Equal(t, "complaint", stderr.String(), "the child's errors")

	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			out, err := exec.Command("/bin/sh", "-c", fmt.Sprintf("echo $((%d*%d)); kill -KILL $$", i, i)).Output()
			ws, ok := errors.AsType[*exec.ExitError](err)
			if !ok || ws.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Errorf("the end of shell %d: %v", i, err)
			}
			inguest.Equal(t, fmt.Sprintf("%d\n", i*i), string(out), "the shell's output")
		})
	}
	wg.Wait()
}

func childEcho(args []string) int {
	in, err := io.ReadAll(os.Stdin)
	if err != nil {
		return 1
	}
	fmt.Print(os.Getenv("GREETING"), " ", string(in))
	fmt.Fprint(os.Stderr, "complaint")
	var code int
	if _, err := fmt.Sscan(args[0], &code); err != nil {
		return 1
	}
	return code
}

// signals: a process gets its own, and what it asks the kernel to send later.
func signals(t *inguest.T) {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGUSR1)
	defer signal.Stop(ch)
	for range 20 {
		t.NoErr(syscall.Kill(os.Getpid(), syscall.SIGUSR1), "kill")
		<-ch
	}
	signal.Notify(ch, syscall.SIGALRM)
	_, err := unix.Setitimer(unix.ITIMER_REAL, unix.Itimerval{Value: unix.Timeval{Usec: 20000}})
	t.NoErr(err, "setitimer")
	inguest.Equal(t, os.Signal(syscall.SIGALRM), <-ch, "the timer's signal")

	// A fault of the processor becomes a panic that can be recovered.
	func() {
		defer func() {
			if r := recover(); r == nil || !strings.Contains(fmt.Sprint(r), "nil pointer") {
				t.Errorf("a nil pointer gave %v", r)
			}
		}()
		var p *[16]int
		sink = p[3]
	}()
	func() {
		defer func() {
			if r := recover(); r == nil || !strings.Contains(fmt.Sprint(r), "divide by zero") {
				t.Errorf("a division by zero gave %v", r)
			}
		}()
		sink = 1 / sink0
	}()
}

//lint:ignore U1000 written only: the compiler must not drop what is computed
var sink int

var sink0 int
