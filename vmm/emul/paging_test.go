package emul

import (
	"errors"
	"testing"

	"github.com/gondola-vmm/gondola/vmm/mem"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// entryOf is where the entry of an address is at a level: 12, 21, 30, 39.
func (g *guest) entryOf(va uint64, level int) mem.Addr {
	table := tables
	for shift := 39; ; shift -= 9 {
		at := table + mem.Addr(va>>shift&0x1ff*8)
		if shift == level {
			return at
		}
		e, err := g.mem.Load64(at)
		require.NoError(g.t, err)
		table = mem.Addr(e & pteAddr)
	}
}

func (g *guest) space() Space {
	return Space{Mem: g.mem, CR0: g.sys.CR0, CR3: g.sys.CR3, CR4: g.sys.CR4, EFER: g.sys.EFER, RFLAGS: g.regs.RFLAGS}
}

func TestTranslate(t *testing.T) {
	const va = uint64(0xffff_9000_4020_1123)
	set := func(level int, e uint64) func(*guest) {
		return func(g *guest) { require.NoError(t, g.mem.Store64(g.entryOf(va, level), e)) }
	}
	flags := func(f uint64) func(*guest) {
		return func(g *guest) { g.mapPage(va, 0x2000, f) }
	}
	const all = pteP | pteW | pteU
	for _, c := range []struct {
		name string
		prep func(*guest)
		a    Access
		want mem.Addr
		code int // of the page fault, -1: none
	}{
		{"4 KiB", flags(pteP), 0, 0x2123, -1},
		{"2 MiB", set(21, 0x200000|pteP|ptePS|pteW|1<<12), Write, 0x201123, -1},
		{"1 GiB", set(30, 0xc0000000|pteP|ptePS), 0, 0xc0201123, -1},
		{"2 MiB, reserved bit", set(21, 0x202000|pteP|ptePS), 0, 0, pfP | pfRSVD},
		{"512 GiB pages are reserved", set(39, pteP|ptePS), 0, 0, pfP | pfRSVD},
		{"not present", flags(0), 0, 0, 0},
		{"not present, upper level", set(30, pteW), Write, 0, pfW},
		{"read-only", flags(pteP), Write, 0, pfP | pfW},
		{"read-only, upper level", func(g *guest) {
			flags(all)(g)
			set(39, uint64(g.tableOf(va, 39))|pteP|pteU)(g)
		}, Write, 0, pfP | pfW},
		{"read-only, CR0.WP clear", func(g *guest) { flags(pteP)(g); g.sys.CR0 &^= cr0WP }, Write, 0x2123, -1},
		{"read-only for the user, CR0.WP clear", func(g *guest) { flags(pteP | pteU)(g); g.sys.CR0 &^= cr0WP }, Write | User, 0, pfP | pfW | pfU},
		{"user page", flags(all), User | Write, 0x2123, -1},
		{"supervisor page", flags(pteP), User, 0, pfP | pfU},
		{"supervisor, upper level", func(g *guest) {
			flags(all)(g)
			set(30, uint64(g.tableOf(va, 30))|pteP|pteW)(g)
		}, User, 0, pfP | pfU},
		{"NX", flags(pteP | pteNX), Fetch, 0, pfP | pfI},
		{"NX data", flags(pteP | pteNX), 0, 0x2123, -1},
		{"NX without EFER.NXE", func(g *guest) { flags(pteP | pteNX)(g); g.sys.EFER &^= eferNXE }, 0, 0, pfP | pfRSVD},
		{"SMEP", func(g *guest) { flags(all)(g); g.sys.CR4 |= cr4SMEP }, Fetch, 0, pfP | pfI},
		{"SMAP", func(g *guest) { flags(all)(g); g.sys.CR4 |= cr4SMAP }, 0, 0, pfP},
		{"SMAP with AC", func(g *guest) { flags(all)(g); g.sys.CR4 |= cr4SMAP; g.regs.RFLAGS |= flagAC }, 0, 0x2123, -1},
		{"SMAP does not concern the user", func(g *guest) { flags(all)(g); g.sys.CR4 |= cr4SMAP }, User, 0x2123, -1},
		{"no paging", func(g *guest) { g.sys.CR0 &^= cr0PG }, 0, 0x40201123, -1},
		{"5-level", func(g *guest) {
			flags(pteP)(g)
			top := mem.Addr(0x3f0000)
			require.NoError(t, g.mem.Store64(top+0x1ff*8, uint64(tables)|all))
			g.sys.CR3, g.sys.CR4 = uint64(top), g.sys.CR4|cr4LA57
		}, 0, 0x2123, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGuest(t)
			g.mapPage(va, 0x2000, pteP)
			c.prep(g)
			s := g.space()
			pa, err := s.Translate(va, c.a)
			if c.code < 0 {
				require.NoError(t, err)
				assert.Equal(t, c.want, pa)
				return
			}
			var e *Exception
			require.ErrorAs(t, err, &e)
			assert.Equal(t, &Exception{Vector: vectorPF, HasCode: true, Code: uint32(c.code), Addr: va}, e)
			assert.Contains(t, e.Error(), "page fault")
		})
	}
	t.Run("accessed and dirty", func(t *testing.T) {
		g := newGuest(t)
		g.mapPage(va, 0x2000, pteP|pteW)
		s := g.space()
		bits := func(level int) uint64 {
			e, err := g.mem.Load64(g.entryOf(va, level))
			require.NoError(t, err)
			return e & (pteA | pteD)
		}
		_, err := s.Translate(va, 0)
		require.NoError(t, err)
		assert.EqualValues(t, pteA, bits(12))
		_, err = s.Translate(va, Write)
		require.NoError(t, err)
		assert.EqualValues(t, pteA|pteD, bits(12))
		for _, level := range []int{21, 30, 39} {
			assert.EqualValues(t, pteA, bits(level))
		}
	})
	t.Run("refused", func(t *testing.T) {
		g := newGuest(t)
		s := g.space()
		_, err := s.Translate(1<<47, 0)
		assert.Equal(t, error(excGP), err)
		s.CR3 = 0xfee00000
		_, err = s.Translate(va, 0)
		assert.ErrorIs(t, err, mem.ErrOutOfRange)
		s.EFER = 0
		_, err = s.Translate(va, 0)
		assert.ErrorContains(t, err, "32-bit paging")
	})
}

// tableOf is the table that the entry of an address at a level points to.
func (g *guest) tableOf(va uint64, level int) mem.Addr {
	e, err := g.mem.Load64(g.entryOf(va, level))
	require.NoError(g.t, err)
	return mem.Addr(e & pteAddr)
}

func TestSpaceReadWrite(t *testing.T) {
	g := newGuest(t)
	const va = uint64(0x7000)
	g.mapPage(va, 0x5000, pteP|pteW)
	g.mapPage(va+4096, 0x3000, pteP)
	s := g.space()
	in := []byte("across two pages")
	require.NoError(t, g.mem.WriteAt(in[:6], 0x5ffa))
	require.NoError(t, g.mem.WriteAt(in[6:], 0x3000))
	out := make([]byte, len(in))
	require.NoError(t, s.Read(va+0xffa, out, 0))
	assert.Equal(t, in, out)
	// The second page is read-only: nothing is written.
	err := s.Write(va+0xffa, []byte("0123456789abcdef"), 0)
	assert.Equal(t, &Exception{Vector: vectorPF, HasCode: true, Code: pfW | pfP, Addr: va + 4096}, err)
	require.NoError(t, s.Read(va+0xffa, out, 0))
	assert.Equal(t, in, out)
	require.NoError(t, s.Write(va+8, []byte("inside"), 0))
	got := make([]byte, 6)
	require.NoError(t, g.mem.ReadAt(got, 0x5008))
	assert.Equal(t, "inside", string(got))
	_, err = s.Map(va, mem.PageSize+1, 0)
	assert.Error(t, err)
}

// FuzzTranslate walks page tables of random contents.
func FuzzTranslate(f *testing.F) {
	f.Add(uint64(0xffff_8000_0000_1000), uint64(0x1027), uint64(0x2067), uint64(0x3087), uint8(0), uint64(0))
	f.Add(uint64(0x1000), uint64(0x80000000000000e7), ^uint64(0), uint64(1), uint8(7), uint64(cr4LA57|cr4SMAP))
	g := newGuest(f)
	f.Fuzz(func(t *testing.T, va, e1, e2, e3 uint64, a uint8, cr4 uint64) {
		for i := range uint64(512) {
			for page, e := range []uint64{e1, e2, e3} {
				at := mem.Addr(0x1000*(page+1)) + mem.Addr(8*i)
				if err := g.mem.Store64(at, e); err != nil {
					t.Fatal(err)
				}
			}
		}
		s := g.space()
		s.CR3, s.CR4 = 0x1000, cr4
		pa, err := s.Translate(va, Access(a))
		var x *Exception
		if err != nil && !errors.As(err, &x) && !errors.Is(err, mem.ErrOutOfRange) {
			t.Fatal(err)
		}
		if err == nil && uint64(pa)&0xfff != va&0xfff {
			t.Fatalf("%#x became %#x", va, pa)
		}
	})
}
