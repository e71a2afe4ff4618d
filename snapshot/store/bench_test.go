package store

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/vmm/mem"
)

// benchDir is where benchmarks write: GONDOLA_BENCH_DIR, or where temporary files
// are.
func benchDir(b *testing.B) string {
	dir, err := os.MkdirTemp(os.Getenv("GONDOLA_BENCH_DIR"), "gondola-bench-")
	require.NoError(b, err)
	b.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "states")
}

// guest is n bytes of memory of which nothing is zero.
func guest(n int) []byte {
	m := make([]byte, n)
	for i := 0; i < n; i += 512 {
		binary.LittleEndian.PutUint64(m[i:], uint64(i)+1)
	}
	return m
}

// fill saves all of memory.
func fill(b *testing.B, s *Store, name string, memory []byte) {
	w, err := s.Create(ctx, Meta{Name: name, Memory: []mem.Range{{Start: 0, Size: uint64(len(memory))}}})
	require.NoError(b, err)
	require.NoError(b, w.Pages(0, memory))
	_, err = w.Commit()
	require.NoError(b, err)
}

// dirty saves n pages, scattered, over a parent.
func dirty(b *testing.B, s *Store, name, parent string, memory []byte, n int) {
	w, err := s.Create(ctx, Meta{Name: name, Parent: parent, Memory: []mem.Range{{Start: 0, Size: uint64(len(memory))}}})
	require.NoError(b, err)
	r := rand.New(rand.NewPCG(uint64(n), 1))
	for range n {
		at := r.IntN(len(memory)/pageSize) * pageSize
		require.NoError(b, w.Page(mem.Addr(at), memory[at:at+pageSize]))
	}
	_, err = w.Commit()
	require.NoError(b, err)
}

// BenchmarkFullSave saves 128 MiB; plain is a write and fsync of the same bytes.
func BenchmarkFullSave(b *testing.B) {
	memory := guest(128 << 20)
	b.Run("store", func(b *testing.B) {
		s := openStore(b, benchDir(b), Options{})
		b.SetBytes(int64(len(memory)))
		for b.Loop() {
			fill(b, s, "x", memory)
			b.StopTimer()
			require.NoError(b, s.Delete(ctx, "x"))
			b.StartTimer()
		}
	})
	b.Run("plain", func(b *testing.B) {
		dir := filepath.Dir(benchDir(b))
		b.SetBytes(int64(len(memory)))
		for b.Loop() {
			plain(b, dir, memory)
		}
	})
}

func plain(b *testing.B, dir string, memory []byte) {
	f, err := os.Create(filepath.Join(dir, "plain"))
	require.NoError(b, err)
	_, err = f.Write(memory)
	require.NoError(b, err)
	require.NoError(b, f.Sync())
	require.NoError(b, f.Close())
	b.StopTimer()
	require.NoError(b, os.Remove(f.Name()))
	b.StartTimer()
}

// BenchmarkIncrement saves dirty pages of 512 MiB. pages-ms is the time until all
// pages are taken, after which a guest could go on.
func BenchmarkIncrement(b *testing.B) {
	memory := guest(512 << 20)
	for _, n := range []int{100, 1000, 16384} {
		b.Run(fmt.Sprint("store/", n), func(b *testing.B) {
			s := openStore(b, benchDir(b), Options{Buffer: 128 << 20})
			fill(b, s, "base", memory)
			b.SetBytes(int64(n) * pageSize)
			for b.Loop() {
				dirty(b, s, "x", "base", memory, n)
				b.StopTimer()
				require.NoError(b, s.Delete(ctx, "x"))
				b.StartTimer()
			}
		})
		b.Run(fmt.Sprint("plain/", n), func(b *testing.B) {
			dir := filepath.Dir(benchDir(b))
			b.SetBytes(int64(n) * pageSize)
			for b.Loop() {
				plain(b, dir, memory[:n*pageSize])
			}
		})
	}
}

// BenchmarkTake is how long a guest waits for 64 MiB of its pages to be taken.
func BenchmarkTake(b *testing.B) {
	memory := guest(64 << 20)
	s := openStore(b, newDir(b), Options{Buffer: 80 << 20})
	b.SetBytes(int64(len(memory)))
	for b.Loop() {
		b.StopTimer()
		w, err := s.Create(ctx, Meta{Name: "x", Memory: []mem.Range{{Start: 0, Size: uint64(len(memory))}}})
		require.NoError(b, err)
		b.StartTimer()
		require.NoError(b, w.Pages(0, memory))
		b.StopTimer()
		require.NoError(b, w.Abort())
		b.StartTimer()
	}
}

// BenchmarkOpenMap opens a state and maps its memory: with nothing else, and with
// ten increments of 100 scattered pages over it.
func BenchmarkOpenMap(b *testing.B) {
	for _, size := range []int{512 << 20, 2 << 30} {
		for _, depth := range []int{0, 10} {
			b.Run(fmt.Sprintf("%dMiB/depth%d", size>>20, depth), func(b *testing.B) {
				s := openStore(b, newDir(b), Options{})
				memory := guest(size)
				fill(b, s, "0", memory)
				for i := range depth {
					dirty(b, s, fmt.Sprint(i+1), fmt.Sprint(i), memory, 100)
				}
				room, err := unix.Mmap(-1, 0, size, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
				require.NoError(b, err)
				defer unix.Munmap(room)
				for b.Loop() {
					st, err := s.Get(ctx, fmt.Sprint(depth))
					require.NoError(b, err)
					require.NoError(b, st.Memory().Map(unsafe.Pointer(&room[0]), 0, uint64(size)))
					require.NoError(b, st.Close())
				}
			})
		}
	}
}

// BenchmarkDiff finds the pages that differ between two branches of 512 MiB, and
// reads them.
func BenchmarkDiff(b *testing.B) {
	memory := guest(512 << 20)
	s := openStore(b, newDir(b), Options{})
	fill(b, s, "base", memory)
	for _, n := range []int{100, 1000, 10000} {
		dirty(b, s, fmt.Sprint(n, "a"), "base", memory, n/2)
		dirty(b, s, fmt.Sprint(n, "b"), "base", memory, n-n/2-1)
		x, err := s.Get(ctx, fmt.Sprint(n, "a"))
		require.NoError(b, err)
		defer x.Close()
		y, err := s.Get(ctx, fmt.Sprint(n, "b"))
		require.NoError(b, err)
		defer y.Close()
		b.Run(fmt.Sprint("find/", n), func(b *testing.B) {
			for b.Loop() {
				x.Diff(y)
			}
		})
		diff := x.Diff(y)
		b.Run(fmt.Sprint("read/", n), func(b *testing.B) {
			for b.Loop() {
				require.NoError(b, x.Memory().ReadRanges(diff, func(mem.Addr, []byte) error { return nil }))
			}
		})
	}
}

// BenchmarkVerify checks 512 MiB.
func BenchmarkVerify(b *testing.B) {
	memory := guest(512 << 20)
	s := openStore(b, newDir(b), Options{})
	fill(b, s, "x", memory)
	b.SetBytes(int64(len(memory)))
	for b.Loop() {
		require.NoError(b, s.Verify(ctx, "x", nil))
	}
}
