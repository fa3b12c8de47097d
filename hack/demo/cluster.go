package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/test/apiserver"
)

// cluster tells the story by kubectl: of a real kube-apiserver and etcd, with the manager and the node agent as they ship. What else a cluster
// has is not there: the guest is a QEMU of libvirt's on this machine, shown as the VirtualMachineInstance that KubeVirt would run it as, and the
// claim is bound to a directory by hand.
type cluster struct {
	*demo
	server   *apiserver.Server
	programs []*exec.Cmd
}

const (
	nodeName = "node1"

	// The operator's own namespace.
	systemNamespace = "vmckpt-system"
)

const storageYAML = `apiVersion: v1
kind: PersistentVolume
metadata: {name: demo-checkpoints}
spec:
  accessModes: [ReadWriteOnce]
  capacity: {storage: 10Gi}
  storageClassName: local
  local: {path: %s}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node1]}]}]}}
  claimRef: {namespace: demo, name: checkpoints}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {namespace: demo, name: checkpoints}
spec:
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 10Gi}}
  storageClassName: local
  volumeName: demo-checkpoints
---
apiVersion: v1
kind: Node
metadata: {name: node1, labels: {kubernetes.io/hostname: node1, kubevirt.io/schedulable: "true"}}
`

const instanceYAML = `apiVersion: kubevirt.io/v1
kind: VirtualMachineInstance
metadata: {namespace: demo, name: web}
spec:
  domain:
    devices: {}
    firmware: {uuid: %s}
    memory: {guest: 1Gi}
status:
  phase: Running
  nodeName: node1
  conditions: [%s]
`

const checkpointYAML = `apiVersion: vmckpt.io/v1alpha1
kind: VMCheckpoint
metadata: {namespace: demo, name: %s}
spec:
  source: {kind: VirtualMachineInstance, name: web}
  storage: {claimName: checkpoints}
`

const restoreYAML = `apiVersion: vmckpt.io/v1alpha1
kind: VMRestore
metadata: {namespace: demo, name: %s}
spec:
  source: {checkpointName: %s}
  target: {kind: VirtualMachineInstance, name: web, mode: %s}
`

func (c *cluster) prepare() (err error) {
	c.say("an API server and its etcd start; the manager and the node agent of VMckpt, as they ship")
	if err := os.Mkdir(filepath.Join(c.dir, "apiserver"), 0o700); err != nil {
		return err
	}
	if c.server, err = apiserver.Start(filepath.Join(c.dir, "apiserver")); err != nil {
		return err
	}
	volume := filepath.Join(c.dir, "volume")
	if err := os.Mkdir(volume, 0o700); err != nil {
		return err
	}
	for _, step := range []func() error{
		func() error { return c.kubectl(false, "", "apply", "--filename", "test/apiserver/kubevirt") },
		func() error { return c.kubectl(true, "", "apply", "--filename", "config/crd/bases") },
		func() error { return c.kubectl(false, "", "create", "namespace", systemNamespace) },
		func() error { return c.kubectl(false, "", "create", "namespace", "demo") },
		func() error { return c.kubectl(false, fmt.Sprintf(storageYAML, volume), "apply", "--filename", "-") },
		func() error { return c.bindClaim() },
		func() error { return c.instance() },
		func() error { return c.start("manager", "--leader-elect=false") },
		func() error {
			return c.start("node-agent", "--node-name", nodeName, "--run-dir", filepath.Join(c.dir, "run"), "--record-dir", filepath.Join(c.dir, "records"))
		},
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// bindClaim does what Kubernetes' own controller of volumes would do.
func (c *cluster) bindClaim() error {
	uid, err := c.output("", "get", "persistentvolumeclaim", "checkpoints", "--namespace", "demo", "--output", "jsonpath={.metadata.uid}")
	if err != nil {
		return err
	}
	if err := c.kubectl(false, "", "patch", "persistentvolume", "demo-checkpoints", "--type", "merge", "--patch", fmt.Sprintf(`{"spec":{"claimRef":{"uid":%q}}}`, uid)); err != nil {
		return err
	}
	return c.kubectl(false, "", "patch", "persistentvolumeclaim", "checkpoints", "--namespace", "demo", "--subresource", "status", "--type", "merge", "--patch", `{"status":{"phase":"Bound"}}`)
}

// instance shows the machine as the VirtualMachineInstance that it would be.
func (c *cluster) instance() error {
	o := c.machine.Options()
	conditions := `{type: Ready, status: "True"}`
	if o.Paused {
		conditions = `{type: Paused, status: "True"}`
	}
	return c.kubectl(false, fmt.Sprintf(instanceYAML, o.UUID, conditions), "apply", "--filename", "-")
}

// start starts one of the programs. What it logs goes to a file.
func (c *cluster) start(name string, args ...string) error {
	log, err := os.Create(filepath.Join(c.dir, name+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	args = append(args, "--kubeconfig", c.server.Kubeconfig(), "--namespace", systemNamespace,
		"--metrics-bind-address", "0", "--health-probe-bind-address", "0", "--log-format", "text")
	cmd := exec.Command(filepath.Join(c.bin, name), args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the %s: %w", name, err)
	}
	c.programs = append(c.programs, cmd)
	return nil
}

func (c *cluster) capture(name string) (captureResult, error) {
	var result captureResult
	if err := c.kubectl(true, fmt.Sprintf(checkpointYAML, name), "apply", "--filename", "-"); err != nil {
		return result, err
	}
	if err := c.wait("vmcheckpoint/" + name); err != nil {
		return result, err
	}
	text, err := c.output("", "get", "vmcheckpoint", name, "--namespace", "demo", "--output", "json")
	if err != nil {
		return result, err
	}
	var o vmckptv1.VMCheckpoint
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return result, fmt.Errorf("decode checkpoint %s: %w", name, err)
	}
	s := o.Status
	result.Kind = strings.ToLower(string(s.Image.Kind))
	result.Duration, result.Downtime = s.Duration.Duration, s.Downtime.Duration
	result.OwnBytes, result.Pages.Written = s.Size.Value(), uint64(s.Memory.WrittenPages)
	return result, nil
}

func (c *cluster) list(last string) error {
	if err := c.kubectl(true, "", "get", "vmcheckpoints", "--namespace", "demo"); err != nil {
		return err
	}
	return c.kubectl(true, "", "get", "vmcheckpoint", last, "--namespace", "demo", "--output", "jsonpath={.status.memory}")
}

// replaced shows the new machine as a new instance: another of the same name.
func (c *cluster) replaced() error {
	if err := c.kubectl(false, "", "delete", "vmi", "web", "--namespace", "demo"); err != nil {
		return err
	}
	return c.instance()
}

func (c *cluster) restore(image string, inPlace bool) error {
	name, mode := "restore-"+image, "Paused"
	if inPlace {
		name, mode = "roll-back-to-"+image, "InPlace"
	}
	if err := c.kubectl(true, fmt.Sprintf(restoreYAML, name, image, mode), "apply", "--filename", "-"); err != nil {
		return err
	}
	if err := c.wait("vmrestore/" + name); err != nil {
		return err
	}
	if err := c.kubectl(true, "", "get", "vmrestore", name, "--namespace", "demo"); err != nil {
		return err
	}
	return c.kubectl(false, "", "patch", "vmi", "web", "--namespace", "demo", "--type", "merge", "--patch", `{"status":{"conditions":[{"type":"Ready","status":"True"}]}}`)
}

// wait waits until an object is ready. Where it does not become so, the object and the logs say why.
func (c *cluster) wait(object string) error {
	err := c.kubectl(true, "", "wait", object, "--namespace", "demo", "--for", "condition=Ready", "--timeout", "60s")
	if err == nil || c.ctx.Err() != nil {
		return err
	}
	text, _ := c.output("", "get", object, "--namespace", "demo", "--output", "yaml") // what there is
	for _, name := range []string{"manager", "node-agent"} {
		log, _ := os.ReadFile(filepath.Join(c.dir, name+".log")) // the same
		text += fmt.Sprintf("\n%s:\n%s", name, log[max(0, len(log)-4000):])
	}
	return fmt.Errorf("%w\n%s", err, text)
}

// kubectl runs kubectl; shown, as a user would see it.
func (c *cluster) kubectl(shown bool, manifest string, args ...string) error {
	if shown {
		fmt.Printf("  $ kubectl %s\n", strings.Join(args, " "))
		if manifest != "" {
			fmt.Println(indent(manifest, "    | "))
		}
	}
	out, err := c.output(manifest, args...)
	if shown && out != "" {
		fmt.Println(indent(out, "    "))
	}
	return err
}

func indent(text, by string) string {
	return by + strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n"+by)
}

func (c *cluster) output(manifest string, args ...string) (string, error) {
	cmd := exec.CommandContext(c.ctx, c.server.KubectlPath(), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.server.Kubeconfig(), "HOME="+c.dir)
	cmd.Stdin = strings.NewReader(manifest)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}

// endBound is how long the programs may take to end in order.
const endBound = 20 * time.Second

func (c *cluster) close() error {
	var errs []error
	for _, p := range c.programs {
		p.Process.Signal(unix.SIGTERM) //nolint:errcheck // it may have ended
	}
	for _, p := range c.programs {
		ctx, cancel := context.WithTimeout(context.Background(), endBound)
		stop := context.AfterFunc(ctx, func() { p.Process.Kill() }) //nolint:errcheck // the same
		if err := p.Wait(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", filepath.Base(p.Path), err))
		}
		stop()
		cancel()
	}
	if c.server != nil {
		errs = append(errs, c.server.Stop())
	}
	return errors.Join(errs...)
}
