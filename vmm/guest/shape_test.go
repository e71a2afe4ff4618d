package guest

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm"
)

func TestShape(t *testing.T) {
	for name, c := range map[string]Config{
		"zero": {},
		"all":  {VCPUs: 3, Memory: 64 << 20, Console: VirtioConsole, RNG: true, Ports: true, NoBalloon: true, DiskSlots: 2, Net: &Network{HostAccess: true, MTU: 1400}},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := ParseShape(c.Shape().String())
			require.NoError(t, err)
			assert.Equal(t, c.Shape(), s)
			var d Config
			require.NoError(t, s.Apply(&d))
			assert.Equal(t, s, d.Shape())
		})
	}
	for _, bad := range []string{"", "{}", "[]", `{"vcpus":1,"memory":4096}`, `{"vcpus":99,"memory":134217728}`, `{"vcpus":1,"memory":134217728,"disks":-1}`,
		`{"vcpus":1,"memory":134217728,"disks":16,"disk_slots":1}`, `{"vcpus":1,"memory":134217728,"console":7}`, `{"vcpus":1,"memory":134217728,"future":1}`} {
		_, err := ParseShape(bad)
		assert.ErrorIs(t, err, ErrShape, bad)
	}
	user, tap, disk := Config{Net: &Network{}}, Config{Net: &Network{Tap: "t"}}, Config{Disks: []Disk{{}}}
	for _, tc := range []struct{ of, with Config }{{Config{}, disk}, {disk, Config{}}, {Config{}, user}, {user, tap}, {tap, user}, {tap, Config{}}} {
		assert.ErrorIs(t, tc.of.Shape().Apply(&tc.with), ErrShape)
	}
}

// A copy may be another station, which its states remember.
func TestShapeOfCopies(t *testing.T) {
	original := Config{Net: &Network{Private: "n", MAC: [6]byte{2, 0, 0, 0, 0, 1}, Address: netip.MustParsePrefix("10.9.0.1/24")}}
	s := original.Shape()
	assert.Equal(t, "10.9.0.1/24", s.Address())
	same := Config{Net: &Network{Private: "n"}}
	require.NoError(t, s.Apply(&same))
	assert.Equal(t, s, same.Shape(), "an address that it was not given again it has still")
	assert.Nil(t, same.Net.identity())
	other := Config{Net: &Network{Private: "n", MAC: [6]byte{2, 0, 0, 0, 0, 2}, Gateway: netip.MustParseAddr("10.9.0.254")}}
	require.NoError(t, s.Apply(&other))
	assert.Equal(t, &proto.NetIdentity{Was: original.Net.MAC[:], MAC: other.Net.MAC[:], Gateway: "10.9.0.254"}, other.Net.identity())
	moved := Config{Net: &Network{Private: "n", Address: netip.MustParsePrefix("10.9.0.7/24")}}
	require.NoError(t, s.Apply(&moved))
	assert.Equal(t, &proto.NetIdentity{Was: original.Net.MAC[:], MAC: original.Net.MAC[:], Address: "10.9.0.7/24"}, moved.Net.identity())
	assert.Equal(t, "10.9.0.7/24", moved.Shape().Address())
	assert.ErrorIs(t, s.Apply(&Config{Net: &Network{Private: "n", MTU: 9000}}), ErrShape)
	assert.Nil(t, original.Net.identity(), "it booted")
}

func FuzzParseShape(f *testing.F) {
	f.Add(Config{}.Shape().String())
	f.Add(Config{Net: &Network{}, Ports: true}.Shape().String())
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ParseShape(text)
		if err != nil {
			return
		}
		assert.LessOrEqual(t, s.VCPUs, vmm.MaxVCPUs)
		again, err := ParseShape(s.String())
		require.NoError(t, err)
		assert.Equal(t, s, again)
	})
}

// Whatever changes what a guest is after its boot changes its inputs; its name and
// command do not.
func TestInputs(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		file := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(file, []byte(content), 0o600))
		return file
	}
	c := Config{Kernel: write("kernel", "k"), Initrd: write("initrd", "i")}
	inputs := func(change func(*Config)) string {
		d := c
		if change != nil {
			change(&d)
		}
		text, err := d.Inputs(context.Background())
		require.NoError(t, err)
		return text
	}
	seen := map[string]bool{inputs(nil): true}
	assert.True(t, seen[inputs(nil)], "the same again")
	for name, change := range map[string]func(*Config){
		"kernel": func(c *Config) { c.Kernel = write("other", "k") }, "initrd": func(c *Config) { c.Initrd = write("another", "i") },
		"none": func(c *Config) { c.Initrd = NoInitrd }, "words": func(c *Config) { c.Cmdline = "x=1" }, "verbose": func(c *Config) { c.Verbose = true },
		"vcpus": func(c *Config) { c.VCPUs = 2 }, "memory": func(c *Config) { c.Memory = 256 << 20 }, "ports": func(c *Config) { c.Ports = true },
		"rng": func(c *Config) { c.RNG = true }, "balloon": func(c *Config) { c.NoBalloon = true }, "net": func(c *Config) { c.Net = &Network{} },
		"slots": func(c *Config) { c.DiskSlots = 1 }, "acpi": func(c *Config) { c.ACPI = true }, "host words": func(c *Config) { c.NoHostCmdline = true },
		"decompress": func(c *Config) { c.SelfDecompress = true }, "command of a foreign kernel": func(c *Config) { c.Command = []string{"x"} },
		"content": func(c *Config) { write("kernel", "changed") },
	} {
		text := inputs(change)
		assert.False(t, seen[text], "%s", name)
		seen[text] = true
	}
	_, err := Config{Kernel: filepath.Join(dir, "missing")}.Inputs(context.Background())
	assert.ErrorIs(t, err, os.ErrNotExist)
}
