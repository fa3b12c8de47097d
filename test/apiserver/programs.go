package apiserver

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmckpt/vmckpt/test/machine"
)

// assetsVariable names a directory with the programs, for every test that uses controller-runtime's envtest.
const assetsVariable = "KUBEBUILDER_ASSETS"

// Programs are the paths of what a [Server] is made of, and of kubectl.
type Programs struct{ Etcd, APIServer, Kubectl string }

// FindPrograms returns the programs in KUBEBUILDER_ASSETS if they are all there, else those of hack/setup. Where there are
// none, the error is *machine.Unavailable.
func FindPrograms() (Programs, error) {
	cache, err := machine.CacheDir()
	if err != nil {
		return Programs{}, err
	}
	if dir := os.Getenv(assetsVariable); dir != "" {
		if p, err := programsIn(dir); err == nil {
			return p, nil
		}
	}
	return programsIn(filepath.Join(cache, "kubernetes"))
}

func programsIn(dir string) (Programs, error) {
	p := Programs{
		Etcd:      filepath.Join(dir, "etcd"),
		APIServer: filepath.Join(dir, "kube-apiserver"),
		Kubectl:   filepath.Join(dir, "kubectl"),
	}
	var missing []string
	for _, path := range []string{p.Etcd, p.APIServer, p.Kubectl} {
		if unix.Access(path, unix.X_OK) != nil {
			missing = append(missing, filepath.Base(path))
		}
	}
	if missing != nil {
		return Programs{}, &machine.Unavailable{Missing: strings.Join(missing, ", ") + " (run hack/setup)"}
	}
	return p, nil
}

// leash writes a script that runs a program so that the kernel kills it when the thread that started it ends, and that
// leaves the program's process id in the file at pidPath.
func leash(path, program, pidPath string) error {
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		return &machine.Unavailable{Missing: "setpriv (of util-linux)"}
	}
	script := fmt.Sprintf("#!/bin/sh\necho $$ >'%s'\nexec '%s' --pdeathsig KILL -- '%s' \"$@\"\n", pidPath, setpriv, program)
	return os.WriteFile(path, []byte(script), 0o700)
}
