package service

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// call performs op as the service does, and decodes its result into v.
func call(t *testing.T, op Op, args, v any) error {
	t.Helper()
	c := &Call{Request: ports.Request{Principal: "ada"}}
	if args != nil {
		raw, err := proto.Marshal(args)
		require.NoError(t, err)
		c.Args = raw
	}
	result, err := op(context.Background(), c)
	if err != nil {
		return err
	}
	raw, err := proto.Marshal(result)
	require.NoError(t, err)
	return proto.Unmarshal(raw, v)
}

func TestHostInfo(t *testing.T) {
	var r HostInfoResult
	require.NoError(t, call(t, HostInfo(t.TempDir()), nil, &r))
	assert.NotZero(t, r.DiskTotal)
	assert.GreaterOrEqual(t, r.DiskTotal, r.DiskFree)
	assert.NotZero(t, r.MemFree)
	assert.Greater(t, r.MemTotal, r.MemFree)
	assert.NotZero(t, r.CPUs)
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	assert.Error(t, call(t, HostInfo(filepath.Join(file, "states")), nil, &r))
	var parent HostInfoResult
	require.NoError(t, call(t, HostInfo(filepath.Join(filepath.Dir(file), "not", "yet")), nil, &parent))
	assert.Equal(t, r.DiskTotal, parent.DiskTotal)

	total, free, err := parseMeminfo(strings.NewReader("MemTotal:  8 kB\nMemFree: 1 kB\nMemAvailable:\t3 kB\n"))
	require.NoError(t, err)
	assert.EqualValues(t, 8<<10, total)
	assert.EqualValues(t, 3<<10, free)
	_, _, err = parseMeminfo(strings.NewReader("MemTotal: many kB\n"))
	assert.Error(t, err)
}

type lister struct {
	states []State
	err    error
}

func (l lister) List(context.Context) ([]State, error) { return l.states, l.err }

func TestList(t *testing.T) {
	var r ListResult
	require.NoError(t, call(t, List(nil), nil, &r))
	assert.Equal(t, ListResult{States: []State{}}, r)
	want := []State{{Name: "a"}, {Name: "b", Parent: "a", Description: "d", Tags: []string{"t"}, UnixMilli: 5, Bytes: 7}}
	require.NoError(t, call(t, List(lister{states: want}), nil, &r))
	assert.Equal(t, want, r.States)
	bad := errors.New("bad")
	assert.ErrorIs(t, call(t, List(lister{err: bad}), nil, &r), bad)
}

func TestMark(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &Marks{Limit: 4 * time.Second}
		op := MarkOp(m)
		mark := func(ms uint64) (granted uint64) {
			var r MarkResult
			require.NoError(t, call(t, op, MarkRequest{Millis: ms, Why: "sound"}, &r))
			return r.Millis
		}
		assert.EqualValues(t, 1500, mark(1500))
		latest, until := m.Latest()
		assert.Equal(t, Mark{For: 1500 * time.Millisecond, Principal: "ada", Why: "sound"}, latest)
		assert.Equal(t, time.Now().Add(1500*time.Millisecond), until)
		time.Sleep(500 * time.Millisecond)
		assert.Zero(t, mark(0), "the end")
		_, until = m.Latest()
		assert.Equal(t, time.Now(), until)
		assert.EqualValues(t, 3500, mark(1<<63), "what is left of the limit")
		time.Sleep(10 * time.Second)
		assert.Zero(t, mark(1), "used up")
		time.Sleep(30 * time.Second)
		assert.EqualValues(t, 4000, mark(5000), "a new account")
	})
	assert.ErrorIs(t, call(t, MarkOp(&Marks{}), "text", nil), &proto.RemoteError{Code: proto.CodeBadRequest})
	var r MarkResult
	require.NoError(t, call(t, MarkOp(&Marks{}), MarkRequest{Millis: 1e9}, &r))
	assert.EqualValues(t, 10_000, r.Millis, "the default limit")
	assert.EqualError(t, call(t, MarkOp(failing{}), nil, &r), "no")
}

type failing struct{}

func (failing) Mark(context.Context, Mark) (time.Duration, error) { return 0, errors.New("no") }
