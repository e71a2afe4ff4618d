package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Compact rewrites a state's file so that it needs no other's and its pages are in
// order: restores into new processes need few mappings then, and its deleted
// ancestors, if nobody else needs them, are removed. The state stays the same in
// all other respects. It can run while the machine does; progress, if not nil, is
// called with bytes. The rule of thumb is to call it when Info.Depth or what
// Memory.Mappings returns is above some 16 or 4096.
func (s *Store) Compact(ctx context.Context, name string, progress func(done, total int64)) error {
	st, err := s.Get(ctx, name)
	if err != nil {
		return err
	}
	defer st.Close()
	ordered := st.info.Depth == 0
	for i, p := range st.memory.places {
		ordered = ordered && (i == 0 || st.memory.places[i-1].slot+st.memory.places[i-1].count == p.slot)
	}
	if ordered {
		return nil
	}
	if err := s.rewrite(ctx, st, len(st.files), s.opts.MaxBytes, progress); err != nil {
		return fmt.Errorf("compact state %q: %w", name, err)
	}
	return nil
}

// Worth is when Reclaim rewrites: Freed bytes in the end, for Written ones.
type Worth func(freed, written int64) bool

// WorthMuch is the Worth of who deletes a state and wants its space back without long
// copying: a quarter of what is written at least.
func WorthMuch(freed, written int64) bool { return freed >= written/4 }

// WorthAny is the Worth of who wants all of the space.
func WorthAny(freed, _ int64) bool { return freed > 0 }

// Reclaim frees what deleted states keep for one other alone: the other gets what it
// needs of them into its own file (which says nothing new of it), and they are removed.
// Deleted states that several others are changes to stay for them. States can be read,
// saved and restored meanwhile; files of states that somebody has open go when the
// directory is opened or changed the next time. progress is as for Compact, for each
// rewritten state anew. It returns how many bytes less there are.
func (s *Store) Reclaim(ctx context.Context, worth Worth, progress func(name string, done, total int64)) (freed int64, err error) {
	_, before, err := s.Usage(ctx)
	if err != nil {
		return 0, err
	}
	for tried := map[ID]bool{}; ; {
		st, n, err := s.reclaimable(ctx, worth, tried)
		if err != nil {
			return 0, err
		}
		if st == nil {
			break
		}
		name := st.info.Name
		// No quota: there is less as soon as the deleted states are gone.
		err = s.rewrite(ctx, st, n, 0, func(done, total int64) {
			if progress != nil {
				progress(name, done, total)
			}
		})
		_ = st.Close() // it was only read
		// Who changed or removed it meanwhile may have freed as much.
		if err != nil && !errors.Is(err, ErrNotFound) {
			return 0, fmt.Errorf("free what state %q alone needs: %w", name, err)
		}
	}
	var after int64
	err = s.locked(ctx, true, func(v *view) error {
		err := s.gc(v)
		_, after = v.usage()
		return err
	})
	return before - after, err
}

// reclaimable opens a state whose first n files, of which all but its own belong to
// deleted states that no other needs, are worth being made one; nil if there is none.
// Those in tried are left out, and the one that is returned is added.
func (s *Store) reclaimable(ctx context.Context, worth Worth, tried map[ID]bool) (st *State, n int, err error) {
	err = s.locked(ctx, false, func(v *view) error {
		needs := map[ID]int{} // how many states are changes to one
		for _, r := range v.records {
			needs[r.Base]++
		}
		for id, r := range v.records {
			if tried[id] || r.Deleted && needs[id] < 2 { // another one will do
				continue
			}
			chain, err := v.chain(r)
			if err != nil {
				continue // List says so
			}
			n = 1
			for n < len(chain) && chain[n].Deleted && needs[chain[n].ID] == 1 {
				n++
			}
			if n == 1 {
				continue
			}
			tried[id] = true
			if st, err = s.state(v, r); err != nil {
				return err
			}
			have, left := uint64(0), uint64(1) // with each file's header
			for _, c := range chain[:n] {
				have += uint64(c.Pages) + 1
			}
			for _, p := range st.merged(n) {
				if p.data != nil {
					left += p.count
				}
			}
			if worth(int64((have-min(left, have))*pageSize), int64(left*pageSize)) {
				return nil
			}
			_ = st.Close() // it was only read
			st = nil
		}
		return nil
	})
	return st, n, err
}

// merged is what the state's first n files together say of memory.
func (st *State) merged(n int) []place {
	if n == len(st.files) {
		return st.memory.places
	}
	var places []place
	for _, d := range slices.Backward(st.files[:n]) {
		places = overlayZeros(places, d, st.memory.ram, true)
	}
	return places
}

// rewrite gives an open state, which it closes, a new file with what its first n files
// have, so that it needs those that come after them alone. ErrNotFound: it, or what it
// needs, is not there any more; ErrQuota: all would have more than limit bytes, if that
// is not 0.
func (s *Store) rewrite(ctx context.Context, st *State, n int, limit int64, progress func(done, total int64)) (err error) {
	places := st.merged(n)
	base := ID{}
	if n < len(st.files) {
		base = st.files[n].id
	}
	var total, done, zero uint64
	for _, p := range places {
		total += p.count
		if p.data == nil {
			zero += p.count
		}
	}
	id := newID()
	data := id.String() + dataSuffix
	var f file
	kept := false
	defer func() {
		if f != nil && !kept {
			err = errors.Join(err, s.fs.Remove(data))
		}
		if f != nil {
			_ = f.Close() // what counts was synced
		}
	}()
	// With the lock, so that nobody's gc sees the file before it is locked.
	err = s.locked(ctx, true, func(*view) (err error) {
		if f, err = s.fs.Create(data); err != nil {
			return err
		}
		ok, err := f.Lock(true)
		if err == nil && !ok {
			err = ErrBusy
		}
		return err
	})
	if err != nil {
		return err
	}
	b := &build{f: f}
	for _, sec := range st.Sections() {
		version, content, err := st.Section(sec)
		if err != nil {
			return err
		}
		if err := b.add(sec, version, content); err != nil {
			return err
		}
	}
	es, origins, err := copyPlaces(ctx, b, places, nil, func() error { return nil }, func(n uint64) {
		done += n
		if progress != nil {
			progress(int64(done*pageSize), int64(total*pageSize))
		}
	})
	if err != nil {
		return err
	}
	size, err := b.finish(st.ID(), base, es, origins)
	if err != nil {
		return err
	}
	if err := syncBoth(s.fs, f); err != nil {
		return err
	}
	_ = st.Close() // so that it does not keep what nobody needs now
	return s.locked(ctx, true, func(v *view) error {
		r := v.records[st.ID()]
		if r == nil || r.Deleted && !st.info.Deleted || !base.IsZero() && v.records[base] == nil {
			return fmt.Errorf("%w: it was deleted or rewritten meanwhile", ErrNotFound)
		}
		if limit > 0 {
			if _, used := v.usage(); used-r.Bytes+size > limit {
				return fmt.Errorf("%w: the state would have %d bytes instead of %d", ErrQuota, size, r.Bytes)
			}
		}
		err := s.change(v, r, func(r *record) {
			r.Data, r.Base = id, base
			r.Bytes, r.Pages, r.Zero, r.Extents = size, int64(b.slots), int64(zero), int64(len(es))
		})
		// If it failed, the record may be either: the next Open removes the
		// file that it does not name.
		kept = true
		if err != nil {
			return err
		}
		_ = s.gc(v) // if not now, then at the next Open
		return nil
	})
}
