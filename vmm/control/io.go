package control

import (
	"errors"

	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// errNoIO is the answer of a machine whose devices are not counted and limited.
var errNoIO = errors.New("the machine has no disks or networks that can be controlled")

func (s *Server) io(c *proto.Call) (IO, error) {
	m, err := s.running(c)
	if err != nil {
		return nil, err
	}
	if io, ok := m.(IO); ok {
		return io, nil
	}
	return nil, errNoIO
}

// limits performs OpLimits.
func (s *Server) limits(c *proto.Call, req *LimitsRequest) (any, error) {
	io, err := s.io(c)
	if err != nil {
		return nil, err
	}
	limiters := make([]*ratelimit.Limiter, len(req.Change))
	for i, l := range req.Change {
		if limiters[i], err = io.Limiter(l.Device); err != nil {
			return nil, err
		}
	}
	for i, l := range req.Change {
		now := limiters[i].Limits()
		for _, v := range []struct {
			to   *uint64
			from *uint64
		}{
			{&now.BytesPerSecond, l.BytesPerSecond}, {&now.BytesBurst, l.BytesBurst},
			{&now.OpsPerSecond, l.OpsPerSecond}, {&now.OpsBurst, l.OpsBurst},
		} {
			if v.from != nil {
				*v.to = *v.from
			}
		}
		limiters[i].Set(now)
	}
	return io.Devices(), nil
}

// attachDisk performs OpDiskAttach.
func (s *Server) attachDisk(c *proto.Call, req *Disk) (any, error) {
	io, err := s.io(c)
	if err != nil {
		return nil, err
	}
	name, err := io.AttachDisk(*req)
	if err != nil {
		return nil, err
	}
	return DiskAttached{Device: name}, nil
}

// detachDisk performs OpDiskDetach.
func (s *Server) detachDisk(c *proto.Call, req *DiskDetach) (any, error) {
	io, err := s.io(c)
	if err != nil {
		return nil, err
	}
	return nil, io.DetachDisk(req.Device)
}

// link performs OpLink.
func (s *Server) link(c *proto.Call, req *Link) (any, error) {
	m, err := s.running(c)
	if err != nil {
		return nil, err
	}
	l, ok := m.(Linker)
	if !ok {
		return nil, errNoIO
	}
	return nil, l.SetLink(req.Up)
}
