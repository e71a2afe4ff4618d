package kvm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Errors of Open and Require.
var (
	// ErrUnavailable: there is no usable /dev/kvm.
	ErrUnavailable = errors.New("KVM is not available")
	// ErrAPIVersion: the kernel speaks another KVM API than 12.
	ErrAPIVersion = errors.New("unsupported KVM API version")
	// ErrMissingCaps: capabilities that gondola needs are missing; the error
	// names all of them.
	ErrMissingCaps = errors.New("KVM lacks capabilities")
)

// Device is the path of the KVM character device.
const Device = "/dev/kvm"

// System is an open /dev/kvm.
type System struct{ f *os.File }

// Open opens /dev/kvm and checks the API version (KVM API 4.1). Errors match
// ErrUnavailable or ErrAPIVersion and say what to do.
func Open() (*System, error) {
	f, err := os.OpenFile(Device, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %s does not exist: the host kernel has no KVM, its module is not loaded (modprobe kvm_intel or kvm_amd), or the container does not pass the device on", ErrUnavailable, Device)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w: no permission to open %s: join the group that owns it (usually: adduser $USER kvm, then log in again), or run as root", ErrUnavailable, Device)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	s := &System{f}
	v, err := ioctl(s.fd(), "KVM_GET_API_VERSION", kvmGetAPIVersion, 0)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%w: %s is not a KVM device: %w", ErrUnavailable, Device, err)
	}
	if v != 12 {
		f.Close()
		return nil, fmt.Errorf("%w: %d, gondola needs 12", ErrAPIVersion, v)
	}
	return s, nil
}

func (s *System) fd() int { return int(s.f.Fd()) }

// Close closes the device. Machines made from it live on.
func (s *System) Close() error { return s.f.Close() }

// CheckExtension returns the value of a capability, 0 if it is missing
// (KVM API 4.4).
func (s *System) CheckExtension(c Cap) (int, error) {
	r, err := ioctl(s.fd(), "KVM_CHECK_EXTENSION", kvmCheckExtension, uintptr(c))
	return int(r), err
}

// Require returns an error that matches ErrMissingCaps and names every one of
// the capabilities that is missing.
func (s *System) Require(caps ...Cap) error {
	var missing []string
	for _, c := range caps {
		v, err := s.CheckExtension(c)
		if err != nil {
			return err
		}
		if v <= 0 {
			missing = append(missing, c.String())
		}
	}
	if missing != nil {
		return fmt.Errorf("%w: %s: a newer host kernel is needed", ErrMissingCaps, strings.Join(missing, ", "))
	}
	return nil
}

// RunSize is the size in bytes of a vCPU's shared run area (KVM API 4.5).
func (s *System) RunSize() (int, error) {
	r, err := ioctl(s.fd(), "KVM_GET_VCPU_MMAP_SIZE", kvmGetVCPUMmapSize, 0)
	if err == nil && r < unsafe.Sizeof(Run{}) {
		err = fmt.Errorf("KVM_GET_VCPU_MMAP_SIZE: %d bytes, need %d: %w", r, unsafe.Sizeof(Run{}), unix.EINVAL)
	}
	return int(r), err
}

// SupportedCPUID returns the CPUID leaves that KVM can show to a guest
// (KVM API 4.46).
func (s *System) SupportedCPUID() ([]CPUIDEntry, error) {
	c := cpuid2{NEnt: maxCPUIDEntries}
	if err := ioctlPtr(s.fd(), "KVM_GET_SUPPORTED_CPUID", kvmGetSupportedCPUID, &c); err != nil {
		return nil, err
	}
	return append([]CPUIDEntry(nil), c.Entries[:c.NEnt]...), nil
}

// MSRIndexList returns the indices of the MSRs that make up a vCPU's state on
// this host (KVM API 4.3).
func (s *System) MSRIndexList() ([]uint32, error) {
	l := msrList{NMSRs: maxMSRs}
	if err := ioctlPtr(s.fd(), "KVM_GET_MSR_INDEX_LIST", kvmGetMSRIndexList, &l); err != nil {
		return nil, err
	}
	return append([]uint32(nil), l.Indices[:l.NMSRs]...), nil
}

// CreateVM makes a machine without memory and vCPUs (KVM API 4.2).
func (s *System) CreateVM() (*VM, error) {
	// The kernel gives up with EINTR while it takes the address space's locks if a
	// signal is there, and the Go runtime sends some. Nobody waits to be kicked
	// yet, so the call is made again, but not for ever.
	r, err := ioctl(s.fd(), "KVM_CREATE_VM", kvmCreateVM, 0)
	for try := 0; errors.Is(err, unix.EINTR) && try < 1000; try++ {
		r, err = ioctl(s.fd(), "KVM_CREATE_VM", kvmCreateVM, 0)
	}
	if err != nil {
		return nil, err
	}
	return &VM{os.NewFile(r, "kvm-vm")}, nil
}
