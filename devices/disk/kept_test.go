package disk_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/disk"
)

// fill writes a byte all over a disk's first n bytes and flushes.
func fill(t *testing.T, d *disk.Disk, b byte, n int) {
	t.Helper()
	require.NoError(t, d.WriteV([][]byte{bytes.Repeat([]byte{b}, n)}, 0))
	require.NoError(t, d.Flush())
}

func first(t *testing.T, d *disk.Disk) byte { return read(t, d, 0, 3)[0] }

func keep(t *testing.T, d *disk.Disk) disk.State {
	t.Helper()
	s, err := d.Keep()
	require.NoError(t, err)
	return s
}

func back(t *testing.T, d *disk.Disk, s disk.State) {
	t.Helper()
	g, err := d.Stage(s)
	require.NoError(t, err)
	g.Commit()
	require.NoError(t, g.Abort(), "does nothing")
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	return list
}

// none is that no state needs a layer.
func none() (map[disk.ID]bool, error) { return nil, nil }

// A disk goes back to its states, in any order, and its own layer's name is that of
// its present content all along.
func TestStates(t *testing.T) {
	for _, own := range []bool{true, false} {
		base, content := rawFile(t, 256<<10)
		dir := filepath.Join(t.TempDir(), "machine", "disks")
		o := disk.Options{States: dir}
		user := filepath.Join(filepath.Dir(base), "user.layer")
		var d *disk.Disk
		var err error
		if own {
			d, err = disk.Scratch(base, o)
		} else {
			require.NoError(t, disk.Create(user, base, 0, disk.Options{}))
			d, err = disk.Open(user, o)
		}
		require.NoError(t, err)
		defer d.Close()

		fill(t, d, 1, 8192)
		one := keep(t, d)
		assert.Len(t, one.Layers, 1)
		fill(t, d, 2, 4096)
		two := keep(t, d)
		assert.Equal(t, one.Layers, two.Layers[1:])
		assert.Equal(t, two, keep(t, d), "nothing was written since")
		fill(t, d, 3, 4096)
		back(t, d, one)
		assert.EqualValues(t, 1, first(t, d))
		fill(t, d, 4, 4096)
		three := keep(t, d)
		assert.Equal(t, one.Layers, three.Layers[1:], "another branch")
		for range 3 {
			back(t, d, two)
			assert.EqualValues(t, 2, first(t, d))
			assert.EqualValues(t, 1, read(t, d, 4096, 3)[0])
			assert.Equal(t, content[8192:9000], read(t, d, 8192, 9000-8192))
			fill(t, d, 9, 300)
			back(t, d, three)
			assert.EqualValues(t, 4, first(t, d))
		}
		fill(t, d, 5, 4096)

		g, err := d.Stage(one)
		require.NoError(t, err)
		require.NoError(t, g.Abort())
		require.NoError(t, g.Abort())
		assert.EqualValues(t, 5, first(t, d), "nothing changed")

		// What is in use stays, whoever needs it.
		need := func() (map[disk.ID]bool, error) { return map[disk.ID]bool{one.Layers[0]: true}, nil }
		require.NoError(t, disk.Collect(dir, need))
		require.NoError(t, d.Check(one))
		require.NoError(t, d.Check(three))
		require.ErrorIs(t, d.Check(two), disk.ErrBase, "nobody needs it")
		require.NoError(t, d.Close())
		if own {
			assert.Len(t, files(t, dir), 2, "the top is gone")
		} else {
			d = open(t, user, o)
			assert.EqualValues(t, 5, first(t, d), "the user's layer has what was written last")
			require.NoError(t, d.Close())
			require.NoError(t, disk.Collect(dir, none))
			d = open(t, user, o)
			assert.EqualValues(t, 5, first(t, d), "what it is based on stays")
			require.NoError(t, d.Close())
			require.NoError(t, os.Remove(user))
		}
		require.ErrorIs(t, disk.Collect(dir, func() (map[disk.ID]bool, error) { return nil, os.ErrInvalid }), os.ErrInvalid)
		require.NoError(t, disk.Collect(dir, none))
		assert.NoDirExists(t, dir, "all is gone")
		assert.Equal(t, []string{base}, files(t, filepath.Dir(base)))
	}
}

// What a killed machine leaves is removed; what a machine has just made is not.
func TestLeftOver(t *testing.T) {
	base, _ := rawFile(t, 64<<10)
	dir := filepath.Join(t.TempDir(), "disks")
	d, err := disk.Scratch(base, disk.Options{States: dir})
	require.NoError(t, err)
	old := time.Now().Add(-time.Hour)
	for _, name := range []string{"run-1234.layer", "run-5678.layer", "else.layer", "other"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
		if name != "run-5678.layer" {
			require.NoError(t, os.Chtimes(filepath.Join(dir, name), old, old))
		}
	}
	path, temporary := d.Path()
	assert.True(t, temporary)
	require.NoError(t, os.Chtimes(path, old, old))
	require.NoError(t, disk.Collect(dir, none))
	assert.ElementsMatch(t, []string{path, filepath.Join(dir, "run-5678.layer"), filepath.Join(dir, "else.layer"), filepath.Join(dir, "other")}, files(t, dir))
	require.NoError(t, d.Close())
}

func TestNotKept(t *testing.T) {
	base, _ := rawFile(t, 64<<10)
	dir := filepath.Join(t.TempDir(), "disks")
	d := open(t, base, disk.Options{States: dir})
	_, err := d.Keep()
	require.ErrorIs(t, err, disk.ErrNoLayer)
	assert.ErrorContains(t, err, "cow")
	require.ErrorIs(t, d.Check(disk.State{Size: 64 << 10, Layers: make([]disk.ID, 1)}), disk.ErrNoLayer)
	require.NoError(t, d.Close())

	tmp, err := disk.Temporary(base, t.TempDir(), disk.Options{})
	require.NoError(t, err)
	_, err = tmp.Keep()
	require.ErrorIs(t, err, disk.ErrNoLayer)
	require.NoError(t, tmp.Close())

	s, err := disk.Scratch(base, disk.Options{States: dir})
	require.NoError(t, err)
	for _, bad := range []disk.State{{Size: 64 << 10}, {Size: 64 << 10, Layers: make([]disk.ID, 1)}, {Size: 64 << 10, Layers: make([]disk.ID, disk.MaxLayers+1)}, {Size: 512, Layers: make([]disk.ID, 1)}} {
		require.Error(t, s.Check(bad))
		_, err := s.Stage(bad)
		require.Error(t, err)
	}
	// A directory that nothing can be made in: all is as before.
	fill(t, s, 7, 512)
	require.NoError(t, os.Chmod(dir, 0o500))
	if os.Getuid() == 0 {
		require.NoError(t, os.Chmod(dir, 0o700))
	} else {
		_, err = s.Keep()
		require.ErrorIs(t, err, os.ErrPermission)
		require.NoError(t, os.Chmod(dir, 0o700))
		fill(t, s, 8, 512)
	}
	keep(t, s)
	require.NoError(t, s.Close())
}

// When there are as many layers as are possible, the next one has what is in all of
// them, and the states before stay what they are.
func TestManyStates(t *testing.T) {
	base, content := rawFile(t, 1<<20)
	dir := filepath.Join(t.TempDir(), "disks")
	d, err := disk.Scratch(base, disk.Options{States: dir})
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	var states []disk.State
	for i := range disk.MaxLayers + 5 {
		require.NoError(t, d.WriteV([][]byte{bytes.Repeat([]byte{byte(i)}, 512)}, uint64(i%80)*4096))
		states = append(states, keep(t, d))
	}
	deepest := 0
	for _, s := range states {
		deepest = max(deepest, len(s.Layers))
	}
	assert.Equal(t, disk.MaxLayers, deepest)
	assert.Less(t, len(states[len(states)-1].Layers), 10)
	for _, i := range []int{len(states) - 1, 0, disk.MaxLayers - 1, disk.MaxLayers, 17} {
		back(t, d, states[i])
		assert.EqualValues(t, byte(i), read(t, d, uint64(i%80)*4096, 3)[0])
		assert.Equal(t, content[200*4096:201*4096], read(t, d, 200*4096, 4096))
		if i+1 < 80 {
			assert.Equal(t, content[(i+1)*4096:][:512], read(t, d, uint64(i+1)*4096, 512), "written later")
		}
	}
}

// A crash between the steps of Keep leaves a layer that Open goes on with.
func TestKeepInterrupted(t *testing.T) {
	base, _ := rawFile(t, 64<<10)
	dir := t.TempDir()
	user := filepath.Join(dir, "user.layer")
	require.NoError(t, disk.Create(user, base, 0, disk.Options{}))
	o := disk.Options{States: filepath.Join(dir, "disks")}
	d := open(t, user, o)
	fill(t, d, 1, 512)
	s := keep(t, d)
	fill(t, d, 2, 512)
	list, err := d.Files()
	require.NoError(t, err)
	require.NoError(t, d.Close())

	// Frozen, with its second name, but without a successor.
	kept := filepath.Join(dir, "user@"+list[0].UUID+disk.Suffix)
	require.NoError(t, os.Link(user, kept))
	left := filepath.Join(dir, "user@new-1234.layer")
	require.NoError(t, disk.Create(left, kept, 0, disk.Options{}))
	d = open(t, user, o)
	assert.EqualValues(t, 2, first(t, d))
	fill(t, d, 3, 512)
	back(t, d, s)
	assert.EqualValues(t, 1, first(t, d))
	require.NoError(t, d.Close())
	assert.NoFileExists(t, left)

	// Frozen by somebody else: it stays so.
	require.NoError(t, disk.Create(filepath.Join(dir, "x.layer"), user, 0, disk.Options{}))
	_, err = disk.Open(user, o)
	require.True(t, errors.Is(err, disk.ErrReadOnly), "%v", err)
}
