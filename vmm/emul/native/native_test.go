package native

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func newRunner(t *testing.T) *Runner {
	r, err := New()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	return r
}

// TestRegisters passes every register through a NOP.
func TestRegisters(t *testing.T) {
	r := newRunner(t)
	for range 1000 {
		var s State
		for i := range s.GPR {
			s.GPR[i] = rand.Uint64()
		}
		s.RFLAGS = rand.Uint64()
		want := s
		require.NoError(t, r.Run([]byte{0x90}, 0, 0, &s))
		require.Equal(t, want.GPR, s.GPR)
		require.Equal(t, want.RFLAGS&Flags, s.RFLAGS)
	}
}

// TestInstructions replaces instructions in the slots again and again.
func TestInstructions(t *testing.T) {
	r := newRunner(t)
	for range 20000 {
		imm := byte(rand.IntN(64))
		s := State{}
		s.GPR[3] = rand.Uint64()
		require.NoError(t, r.Run([]byte{0x48, 0xc1, 0xc3, imm}, 0, 0, &s)) // rol rbx, imm
		want := State{GPR: s.GPR}
		require.NoError(t, r.Run([]byte{0x48, 0xc1, 0xcb, imm}, 0, 0, &s)) // ror rbx, imm
		got := s.GPR[3]<<imm | s.GPR[3]>>(64-imm)
		require.Equal(t, want.GPR[3], got)
	}
}

func TestData(t *testing.T) {
	r := newRunner(t)
	copy(r.Data()[100:], "operand!")
	var s State
	require.NoError(t, r.Run([]byte{0x4c, 0x8b, 0x3d, 0, 0, 0, 0}, 3, 100, &s)) // mov r15, [rip+..]
	assert.EqualValues(t, 0x21646e617265706f, s.GPR[15])
	s.GPR[0] = 0x55
	require.NoError(t, r.Run([]byte{0x88, 0x05, 0, 0, 0, 0}, 2, 4095, &s)) // mov [rip+..], al
	assert.EqualValues(t, 0x55, r.Data()[4095])
}

func TestRefused(t *testing.T) {
	r := newRunner(t)
	var s State
	for _, c := range []struct {
		insn      []byte
		disp, off int
	}{
		{nil, 0, 0},
		{bytes.Repeat([]byte{0x66}, 16), 0, 0},
		{[]byte{0x90}, -1, 0},
		{[]byte{0x90}, 1, 0},
		{[]byte{0x8b, 0x05, 0, 0, 0, 0}, 2, -1},
		{[]byte{0x8b, 0x05, 0, 0, 0, 0}, 2, 4096},
		{[]byte{0x8b, 0x05, 0, 0, 0, 0}, 3, 0},
	} {
		assert.ErrorIs(t, r.Run(c.insn, c.disp, c.off, &s), ErrInstruction)
	}
	require.NoError(t, r.Close())
	require.NoError(t, r.Close())
	assert.ErrorIs(t, r.Run([]byte{0x90}, 0, 0, &s), ErrInstruction)
}

// TestSignals has signals arrive, and the collector preempt, in the middle.
func TestSignals(t *testing.T) {
	c := make(chan os.Signal, 100)
	signal.Notify(c, syscall.SIGUSR1)
	defer signal.Stop(c)
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = syscall.Kill(syscall.Getpid(), syscall.SIGUSR1)
				_ = make([]byte, 1<<16)
			}
		}
	}()
	r := newRunner(t)
	for i := range 300000 {
		var s State
		for n := range s.GPR {
			s.GPR[n] = uint64(i*n) << 32
		}
		want := s.GPR
		if err := r.Run([]byte{0x90}, 0, 0, &s); err != nil || s.GPR != want {
			t.Fatalf("%v, got %x want %x", err, s.GPR, want)
		}
	}
	close(stop)
	<-done
}

func BenchmarkRun(b *testing.B) {
	r, err := New()
	require.NoError(b, err)
	defer r.Close()
	var s State
	insn := []byte{0xf3, 0x48, 0x0f, 0xb8, 0xc3}
	b.ReportAllocs()
	for b.Loop() {
		if err := r.Run(insn, 0, 0, &s); err != nil {
			b.Fatal(err)
		}
	}
}
