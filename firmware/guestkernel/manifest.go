package guestkernel

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

const (
	manifestFormat = 1
	manifestName   = "manifest.json"
	// manifestLimit bounds what is read of a manifest that may be damaged.
	manifestLimit = 64 << 10
	logName       = "build.log"
)

// products are the files of a kernel that the manifest vouches for.
var products = [...]string{"vmlinux", "bzImage", "config", "System.map"}

// manifest is written last into a finished kernel's directory.
type manifest struct {
	Format   int                `json:"format"`
	Hash     string             `json:"hash"`
	Source   string             `json:"source"`
	Release  string             `json:"release"`
	Compiler string             `json:"compiler"`
	Built    time.Time          `json:"built"`
	Seconds  float64            `json:"seconds"`
	Files    map[string]product `json:"files"`
}

type product struct {
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

func measure(path string) (product, error) {
	f, err := os.Open(path)
	if err != nil {
		return product{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return product{}, err
	}
	return product{Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}, nil
}

// seal measures the products in dir and writes the manifest; all of it is on
// disk when it returns.
func (m manifest) seal(dir string) error {
	m.Format = manifestFormat
	m.Files = make(map[string]product)
	for _, name := range products {
		p, err := measure(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		m.Files[name] = p
		if err := syncPath(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, manifestName)
	if err := os.WriteFile(path, append(text, '\n'), 0o644); err != nil {
		return err
	}
	if err := syncPath(path); err != nil {
		return err
	}
	return syncPath(dir)
}

// open reads the kernel in dir and checks every product against the manifest.
func open(dir, hash string) (Kernel, error) {
	damaged := func(format string, a ...any) (Kernel, error) {
		return Kernel{}, fmt.Errorf("%w: %s: %w", ErrDamaged, dir, fmt.Errorf(format, a...))
	}
	f, err := os.Open(filepath.Join(dir, manifestName))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
			return Kernel{}, fmt.Errorf("%w (looked in %s)", ErrNotBuilt, dir)
		}
	}
	if err != nil {
		return damaged("%w", err)
	}
	defer f.Close()
	var m manifest
	if err := json.NewDecoder(io.LimitReader(f, manifestLimit)).Decode(&m); err != nil {
		return damaged("manifest: %w", err)
	}
	if m.Format != manifestFormat || m.Hash != hash {
		return damaged("manifest is of recipe %q, format %d", m.Hash, m.Format)
	}
	for _, name := range products {
		p, err := measure(filepath.Join(dir, name))
		if err != nil {
			return damaged("%w", err)
		}
		if p != m.Files[name] {
			return damaged("%s is not what was built", name)
		}
	}
	return Kernel{
		Dir:           dir,
		VMLinux:       filepath.Join(dir, "vmlinux"),
		BzImage:       filepath.Join(dir, "bzImage"),
		Config:        filepath.Join(dir, "config"),
		SystemMap:     filepath.Join(dir, "System.map"),
		Log:           filepath.Join(dir, logName),
		Hash:          m.Hash,
		SourceVersion: m.Source,
		Release:       m.Release,
		Compiler:      m.Compiler,
		Built:         m.Built,
		BuildTime:     time.Duration(m.Seconds * float64(time.Second)),
		VMLinuxSize:   m.Files["vmlinux"].Size,
		BzImageSize:   m.Files["bzImage"].Size,
	}, nil
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
